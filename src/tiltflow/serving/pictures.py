"""Encoded pictures to pixels: what is accepted, how far it is trusted, and what becomes of unusual ones.

Accepted are single PNG, JPEG and WebP pictures that end where their file does. The size is read from the header and
checked before anything is decoded. The pixels are those that a file has everywhere in this package: an alpha channel is
dropped, not blended; an orientation tag is applied; palette, grey and CMYK pictures become RGB; of 16 bits per channel
the upper 8 are kept.
"""

import base64
import binascii
import io
import re
import struct
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, WebPImagePlugin

from tiltflow.runtime.pixels import to_rgb, upright
from tiltflow.serving.wire import Limits, WireError

FORMATS: Final = ("PNG", "JPEG", "WEBP")
_NEXT_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, after a stretch of coded data
_BARE_MARKERS: Final = (0x01, *range(0xD0, 0xD9))  # those that no length follows


class Budget:
    """How many bytes of pixels one request may still unfold to; shared by the threads that decode."""

    def __init__(self, size: int, *, hold: Callable[[int], None]):
        """Start with `size` bytes.

        Args:
            size: Of this request.
            hold: Counts bytes among those of all requests, or raises a WireError.
        """
        self._size = size
        self._left = size
        self._hold = hold
        self._lock = Lock()

    def take(self, count: int) -> None:
        """Use up bytes.

        Raises:
            WireError: There are not so many left: `payload_too_large`, or `overloaded` where other requests have them.
        """
        with self._lock:
            self._left -= count
            if self._left < 0:
                raise WireError(
                    "payload_too_large",
                    f"the pictures unfold to more than the {self._size} bytes that one request may have; send fewer at "
                    "once",
                )
        self._hold(count)


def decode_base64(text: str, *, param: str) -> bytes:
    """Return what a text in base64 holds.

    Raises:
        WireError: It is no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError("image_decode_failed", f"{param}: no base64: {error}", param=param) from error


def decode(data: bytes, *, limits: Limits, budget: Budget, param: str) -> NDArray[np.uint8]:
    """Decode one picture.

    Args:
        data: The whole file.
        limits: The largest picture.
        budget: Loses the bytes of the pixels before they exist.
        param: The field that holds the picture, for messages.

    Returns:
        Levels `[H, W, 3]`.

    Raises:
        WireError: `image_decode_failed`, `invalid_item` if it is too large, `payload_too_large` or `overloaded` if the
            budget is spent.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning may be an error, too
        raise WireError("invalid_item", f"{param}: {error}", param=param) from error
    except Exception as error:  # the readers of the formats stumble over damage in ways of their own
        raise _failure(param, f"no PNG, JPEG or WebP picture ({_reason(error)})") from error
    check_size(picture.height, picture.width, limits=limits, param=param)
    _check_one_picture(picture, param)
    try:
        end = _END[str(picture.format)](data)
    except (IndexError, struct.error) as error:
        raise _failure(param, "the file is cut short") from error
    if end > len(data):
        raise _failure(param, "the file is cut short")
    if end < len(data):
        raise _failure(param, f"the picture ends after {end} of {len(data)} bytes; send nothing else with it")
    budget.take(picture.height * picture.width * 3)
    try:
        return np.asarray(to_rgb(upright(picture)))
    except Exception as error:  # as above
        raise _failure(param, _reason(error)) from error


def check_size(height: int, width: int, *, limits: Limits, param: str) -> None:
    """Check a picture's size, known from its header or the shape of its tensor.

    Raises:
        WireError: It is too large.
    """
    if height > limits.image_side or width > limits.image_side or height * width > limits.image_pixels:
        raise WireError(
            "invalid_item",
            f"{param}: a picture of {width}x{height} pixels; the most are {limits.image_side} a side and "
            f"{limits.image_pixels} in all",
            param=param,
        )


def stack_frames(frames: Sequence[Any], *, param: str) -> Any:
    """Return pictures (`Pixels`) of one kind as a video, which has one more axis in front.

    Raises:
        WireError: They differ in size or dtype.
    """
    kinds = sorted({f"{list(frame.shape)} {frame.dtype}" for frame in frames})
    if len(kinds) > 1:
        message = f"{param}: frames of the kinds {', '.join(kinds)}; send frames of one size and dtype"
        raise WireError("invalid_item", message, param=param)
    return np.stack(frames)


def _check_one_picture(picture: Image.Image, param: str) -> None:
    if isinstance(picture, PngImagePlugin.PngImageFile | WebPImagePlugin.WebPImageFile) and picture.n_frames > 1:
        raise _failure(param, f"the file has {picture.n_frames} frames; send a video as a list of single pictures")


def _png_end(data: bytes) -> int:
    """Return where a PNG file ends: after its chunk IEND."""
    place = 8
    while True:
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        place += 12 + length
        if kind == b"IEND":
            return place


def _webp_end(data: bytes) -> int:
    """Return where a WebP file ends: a RIFF container tells its size."""
    (length,) = struct.unpack_from("<I", data, 4)
    return 8 + length + length % 2


def _jpeg_end(data: bytes) -> int:
    """Return where a JPEG file ends: after its first marker EOI, looked for from segment to segment."""
    place = 2
    while True:
        found = _NEXT_MARKER.search(data, place)
        if found is None:
            raise IndexError("no marker EOI")
        marker, place = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return place
        if marker not in _BARE_MARKERS:
            place += struct.unpack_from(">H", data, place)[0]


_END: Final = {"PNG": _png_end, "WEBP": _webp_end, "JPEG": _jpeg_end, "MPO": _jpeg_end}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _failure(param: str, why: str) -> WireError:
    return WireError("image_decode_failed", f"{param}: {why}", param=param)
