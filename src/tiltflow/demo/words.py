"""The drawn world of words: signs with one short word in capital letters, and their prompts, split by word."""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tiltflow.demo.vocabulary import IMAGE_SIZE

WORDS_FILE: Final = Path(__file__).parent / "words.txt"  # one word a line, 2 to 4 capital letters
FONT_FILE: Final = Path(__file__).parent / "fonts" / "DejaVuSans-Bold-ASCII.ttf"
HELD_OUT_FRACTION: Final = 0.2
TAGS: Final = {2: "two_letters", 3: "three_letters", 4: "four_letters"}

SUPERSAMPLING: Final = 4
# Every letter has a place of its own, as on a board with four slots: what stands in one depends on one letter alone,
# which is what a model of this size can learn in an hour.
SLOTS: Final = 4
SLOT_WIDTH: Final = 15.0  # pixels
LETTER_WIDTH: Final = 13.0  # pixels at most; wider letters are condensed
LETTER_HEIGHT: Final = 20.0  # of capital letters, in pixels
SHIFT: Final = (1.0, 4.0)  # of the whole word to either side, across and down, in pixels
PAPER: Final = (205, 245)  # each channel of the background
INK: Final = (10, 70)  # each channel of the letters


@lru_cache(maxsize=1)
def all_words() -> tuple[str, ...]:
    """Return every word of the world, in capital letters, shorter ones first."""
    return tuple(WORDS_FILE.read_text(encoding="utf-8").split())


def split_prompts(split: Literal["train", "test"]) -> list[dict[str, str]]:
    """Return the prompts of one split: `prompt`, the `word` that it quotes, and its length as `tag`.

    A fifth of the words of each length is held out; which ones depends on the letters alone.
    """
    held_out = _held_out()
    return [
        {"prompt": word_prompt(word), "word": word, "tag": TAGS[len(word)]}
        for word in all_words()
        if (word in held_out) == (split == "test")
    ]


def word_prompt(word: str) -> str:
    """Return the prompt of a word, such as `a sign that says "CAT"`."""
    return f'a sign that says "{word}"'


def draw_word(word: str, *, rng: np.random.Generator, size: int = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Draw one word, dark on light, with its exact place and its colours left to chance.

    Args:
        word: At most four letters of ASCII.
        rng: Source of all randomness.
        size: Side of the square image in pixels.

    Returns:
        RGB image, uint8 `[size, size, 3]`.
    """
    scale = size / IMAGE_SIZE * SUPERSAMPLING
    across, down = (rng.uniform(-shift, shift) for shift in SHIFT)
    paper, ink = (tuple(int(value) for value in rng.integers(low, high + 1, 3)) for low, high in (PAPER, INK))
    side = size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), paper)
    first = (SLOTS - len(word)) // 2
    y = (IMAGE_SIZE - LETTER_HEIGHT) / 2 + down
    for place, letter in enumerate(word):
        stencil = _letter(letter, round(LETTER_WIDTH * scale), round(LETTER_HEIGHT * scale))
        centre = (IMAGE_SIZE - SLOTS * SLOT_WIDTH) / 2 + (first + place + 0.5) * SLOT_WIDTH + across
        canvas.paste(ink, (round(centre * scale - stencil.width / 2), round(y * scale)), stencil)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


class DrawnWords:
    """Signs drawn on demand; the captions cover every word, the signs only those of the training split."""

    def __init__(self) -> None:
        self.captions: Sequence[str] = [word_prompt(word) for word in all_words()]
        self._words = [line["word"] for line in split_prompts("train")]

    def draw(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """Draw `count` signs.

        Returns:
            Images, uint8 `[count, 3, 64, 64]`, and their captions; the same for the same seed.
        """
        rng = np.random.default_rng(seed)
        words = [self._words[int(index)] for index in rng.integers(len(self._words), size=count)]
        images = np.stack([draw_word(word, rng=rng) for word in words])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [word_prompt(word) for word in words]


@lru_cache(maxsize=1)
def _held_out() -> frozenset[str]:
    chosen: list[str] = []
    for length in TAGS:
        ranked = sorted(
            (word for word in all_words() if len(word) == length), key=lambda word: zlib.crc32(word.encode())
        )
        chosen += ranked[: round(HELD_OUT_FRACTION * len(ranked))]
    return frozenset(chosen)


@lru_cache(maxsize=64)
def _letter(letter: str, width: int, height: int) -> Image.Image:
    """Return a letter's stencil, of its own width or condensed to `width`, and scaled to `height`."""
    # The basic layout: the other one needs a library that is not on every machine, and would draw other pixels there.
    font: Any = ImageFont.truetype(str(FONT_FILE), 2 * height, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(letter)
    large = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(large).text((-left, -top), letter, font=font, fill=255)
    natural = round(large.width * height / large.height)
    return large.resize((min(width, natural), height), Image.Resampling.LANCZOS)
