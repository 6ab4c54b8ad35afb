"""Pictures of every mode and orientation: the pixels that scoring, training and servers get of them."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tiltflow.data.images import ImageFile, read_pixels
from tiltflow.errors import DataError
from tiltflow.rewards import build_reward
from tiltflow.runtime.pixels import to_rgb, upright
from tiltflow.types import Prompt

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_kept(form: str, tmp_path: Path) -> None:
    (tmp_path / "grey.png").write_bytes(saved(Image.fromarray(RAMP), form))
    pixels = read_pixels(tmp_path / "grey.png", name="it").numpy()
    np.testing.assert_array_equal(pixels, np.repeat((RAMP >> 8)[..., None], 3, axis=2))
    image = ImageFile(tmp_path / "grey.png", Prompt("")).load()
    assert image.shape == (3, 32, 32) and 0.49 < image.mean().item() < 0.51


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_tag_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(COLOURS), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected is not None
    np.testing.assert_array_equal(read_pixels(data, name="it").numpy(), np.asarray(expected))


def test_grey_of_16_bits_is_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = read_pixels(saved(Image.fromarray(RAMP), exif=exif), name="it").numpy()
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(RAMP, -1) >> 8)


@pytest.mark.parametrize("exif", [b"junk", b"Exif\0\0junkjunkjunk"])
def test_damaged_exif_data_say_nothing(exif: bytes) -> None:
    np.testing.assert_array_equal(read_pixels(saved(Image.fromarray(COLOURS), exif=exif), name="it").numpy(), COLOURS)


def test_a_damaged_entry_of_exif_data_says_nothing() -> None:
    """The other entries count, except where warnings are errors, as in these tests."""
    entries = [(0x0112, 3, 1, 6), (0x010F, 2, 100, 5000)]  # tag, type, count, value: turned; a text beyond the end
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    data = saved(Image.fromarray(COLOURS), exif=exif)
    np.testing.assert_array_equal(read_pixels(data, name="it").numpy(), COLOURS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
        np.testing.assert_array_equal(read_pixels(data, name="it").numpy(), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("value", [0, 9])
def test_an_orientation_that_there_is_not_says_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(read_pixels(saved(Image.fromarray(COLOURS), exif=exif), name="it").numpy(), COLOURS)


def test_what_has_no_range_is_refused() -> None:
    data = saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(DataError, match="it cannot be read: pixels are floating-point numbers"):
        read_pixels(data, name="it")
    with pytest.raises(ValueError, match="more than 16 bits"):
        to_rgb(Image.fromarray(np.full((4, 4), 70_000, np.int32)))


def test_pictures_of_8_bits_are_what_pillow_makes_of_them() -> None:
    colours = Image.fromarray(COLOURS)
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr"):
        picture = colours.convert(mode)
        assert to_rgb(picture).tobytes() == picture.convert("RGB").tobytes()
    assert to_rgb(colours) is colours and upright(colours) is colours


def test_a_reward_that_is_given_such_a_picture_reads_it_too() -> None:
    reward = build_reward("JPEGCompressibility", device="cpu")
    ramp, same = Image.fromarray(RAMP), Image.fromarray((RAMP >> 8).astype(np.uint8))
    one, other = reward(prompt=["", ""], image=[ramp, same]).rewards
    assert float(one) == float(other)
