"""One meaning of a picture everywhere: 8 bits of red, green and blue, the way up that its orientation tag says."""

from typing import Final

import numpy as np
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

_SIXTEEN_BITS: Final = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow would cut grey levels off at 255
_UPRIGHT: Final = {  # value of the tag -> what undoes it
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def upright(picture: Image.Image) -> Image.Image:
    """Return a picture as viewers show it: turned as the EXIF orientation of its file says."""
    try:
        turn = _UPRIGHT.get(picture.getexif().get(Base.Orientation, 1))
    except (SyntaxError, UserWarning):  # of EXIF data that are damaged; where warnings are errors they raise this one
        return picture
    return picture if turn is None else picture.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in Pillow's mode RGB; of 16 bits per channel the upper 8 are kept, alpha is dropped.

    Raises:
        ValueError: Its pixels are floating-point numbers, or have more than 16 bits.
    """
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range nobody knows; save it with 8 or 16 bits")
    if picture.mode in _SIXTEEN_BITS:
        grey = np.asarray(picture)
        if int(grey.max()) > 0xFFFF or int(grey.min()) < 0:
            raise ValueError("grey levels of more than 16 bits")
        picture = Image.fromarray((grey >> 8).astype(np.uint8))
    return picture.convert("RGB")
