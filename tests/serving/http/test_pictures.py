"""Pictures that are not what they seem, and what becomes of unusual ones."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serving.http.servers import picture
from tiltflow.serving.pictures import Budget, decode, decode_base64, stack_frames
from tiltflow.serving.wire import Limits, WireError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(data: bytes, *, limits: Limits | None = None, budget: int = 2**30) -> Any:
    return decode(
        data, limits=limits or Limits(), budget=Budget(budget, hold=lambda count: None), param="items[0].image"
    )


def failure(data: bytes, **how: Any) -> WireError:
    with pytest.raises(WireError) as caught:
        read(data, **how)
    return caught.value


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_the_levels_back(form: str, options: dict[str, Any]) -> None:
    found = read(encoded(Image.fromarray(NOISE), form, **options))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, NOISE)


def test_jpeg_is_what_pillow_makes_of_it() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", quality=95)
    np.testing.assert_array_equal(read(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("quality", [{"progressive": True}, {"restart_marker_blocks": 1}, {"optimize": True}])
def test_the_end_of_any_jpeg_is_found(quality: dict[str, Any]) -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", **quality)
    assert read(data).shape == (40, 30, 3)
    assert "ends after" in failure(data + b"\xff\xd9").message


def test_alpha_is_dropped_and_not_blended() -> None:
    rgba = np.dstack([NOISE, np.zeros((40, 30), np.uint8)])
    np.testing.assert_array_equal(read(encoded(Image.fromarray(rgba))), NOISE)


def test_palettes_grey_and_cmyk_become_rgb() -> None:
    grey = NOISE[:, :, 0]
    np.testing.assert_array_equal(read(encoded(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))
    few = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(read(encoded(few)), np.asarray(few.convert("RGB")))
    one_bit = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(read(encoded(one_bit)), np.asarray(one_bit.convert("RGB")))
    cmyk = encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG")
    assert read(cmyk).shape == (40, 30, 3)


def test_of_16_bits_the_upper_8_are_kept() -> None:
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(grey)))[:, :, 0], grey >> 8)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_an_orientation_tag_is_applied(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = (read(encoded(Image.fromarray(NOISE), form, exif=each)) for each in (Image.Exif(), exif))
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused(form: str) -> None:
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    error = failure(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert error.code == "image_decode_failed" and "2 frames" in error.message


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_cut_is_noticed(form: str) -> None:
    data = encoded(Image.fromarray(NOISE), form)
    for length in range(0, len(data), 7):
        assert failure(data[:length]).code == "image_decode_failed"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damage_is_an_error_or_a_picture_and_nothing_else(form: str) -> None:
    data = encoded(Image.fromarray(NOISE), form)
    generator = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 4):
            damaged[place] = generator.integers(0, 256)
        try:
            assert read(bytes(damaged)).shape[2] == 3
        except WireError as error:
            assert error.code in ("image_decode_failed", "invalid_item")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS"])
def test_other_formats_are_refused(form: str) -> None:
    assert failure(picture(form=form, side=16)).code == "image_decode_failed"


def png_of_size(width: int, height: int) -> bytes:
    """Return the beginning of a PNG file of a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(12000, 12000), (8193, 1), (1, 8193), (5000, 5000), (2**31 - 1, 2**31 - 1)])
def test_the_header_tells_what_is_too_large(size: tuple[int, int]) -> None:
    error = failure(png_of_size(*size))
    assert error.code == "invalid_item" and error.param == "items[0].image"


def test_the_budget_is_asked_before_decoding() -> None:
    error = failure(png_of_size(1000, 1000), budget=2_999_999)
    assert error.code == "payload_too_large"
    assert failure(png_of_size(1000, 1000), budget=3_000_000).code == "image_decode_failed"  # there are no pixels


def test_base64() -> None:
    assert decode_base64("aGk=", param="p") == b"hi"
    for text in ("aGk", "a Gk=", "äöü", "aGk=!"):
        with pytest.raises(WireError, match="p: no base64"):
            decode_base64(text, param="p")


def test_frames_are_of_one_kind() -> None:
    assert stack_frames([NOISE, NOISE], param="p").shape == (2, 40, 30, 3)
    with pytest.raises(WireError, match="send frames of one size"):
        stack_frames([NOISE, NOISE[1:]], param="p")
