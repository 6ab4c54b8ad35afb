"""The JPEG reward: exact sizes, the formula, and what it does with images of other kinds."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.samples import batch, entry
from tiltflow.rewards import RewardEngine, build_reward
from tiltflow.rewards.jpeg import jpeg_bytes

ROWS, COLUMNS = np.mgrid[:64, :64]


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


FLAT = Image.new("RGB", (64, 64), (0, 0, 0))
SQUARES = grey((ROWS // 8 + COLUMNS // 8) % 2 * 255)
PIXELS = grey((ROWS + COLUMNS) % 2 * 255)


@pytest.mark.parametrize(
    ("image", "size"),
    [(FLAT, 691), (Image.new("RGB", (512, 512), (128, 128, 128)), 4721), (SQUARES, 755), (PIXELS, 3202)],
)
def test_sizes_at_quality_95(image: Image.Image, size: int) -> None:
    assert jpeg_bytes(image) == size


def test_the_reward_is_minus_a_five_hundredth_of_the_thousands_of_bytes() -> None:
    output = build_reward("JPEGCompressibility")(prompt=None, image=[FLAT, SQUARES, PIXELS])
    assert output.rewards == pytest.approx([-(size / 1000) / 500 for size in (691, 755, 3202)], rel=1e-12)
    assert output.extra_info == {"bytes": [691, 755, 3202]}


def test_an_image_with_transparency_counts_as_rgb() -> None:
    assert jpeg_bytes(FLAT.convert("RGBA")) == jpeg_bytes(FLAT.convert("L")) == jpeg_bytes(FLAT)


def test_in_the_engine() -> None:
    table = RewardEngine([entry("jpeg", "JPEGCompressibility", batch_size=2)]).score(batch([0.0, 0.5, 1.0]))
    assert table.failures == ()
    sizes = table.extra_info["jpeg"]["bytes"]
    assert torch.equal(table.column("jpeg"), torch.tensor([-size / 500_000 for size in sizes]))
