"""Every prompt of the drawn world, in GenEval's format, split so that no evaluation prompt is ever trained on."""

import itertools
import zlib
from functools import lru_cache
from typing import Final, Literal

from tiltflow.data import geneval
from tiltflow.data.geneval import TAGS, Metadata, content
from tiltflow.demo.vocabulary import COLORS, NUMBERS, RELATIONS, SHAPES

HELD_OUT_FRACTION: Final = 0.2


@lru_cache(maxsize=1)
def all_prompts() -> tuple[Metadata, ...]:
    """Return every prompt of the world once, tag after tag, in GenEval's `tag, include, exclude, prompt` form."""
    pairs = list(itertools.permutations(SHAPES, 2))
    return (
        *(geneval.single_object(shape) for shape in SHAPES),
        *(geneval.two_object(a, b) for a, b in pairs),
        *(geneval.counting(shape, count) for shape, count in itertools.product(SHAPES, NUMBERS)),
        *(geneval.colors(shape, color) for shape, color in itertools.product(SHAPES, COLORS)),
        *(geneval.position(a, relation, b) for (a, b), relation in itertools.product(pairs, RELATIONS)),
        *(
            geneval.color_attr(a, c, b, d)
            for (a, b), (c, d) in itertools.product(pairs, itertools.permutations(COLORS, 2))
        ),
    )


def split_prompts(split: Literal["train", "test"]) -> list[Metadata]:
    """Return the prompts of one split; two orders of the same objects always fall into the same split.

    A prompt's split depends only on what it shows, so the two lists never share a scene, and it never changes between
    machines. Every tag holds out the same share.
    """
    held_out = _held_out()
    return [line for line in all_prompts() if (content(line) in held_out) == (split == "test")]


@lru_cache(maxsize=1)
def _held_out() -> frozenset[str]:
    chosen: list[str] = []
    for tag in TAGS:
        contents = {content(line) for line in all_prompts() if line["tag"] == tag}
        ranked = sorted(contents, key=lambda text: zlib.crc32(text.encode()))
        chosen += ranked[: max(1, round(HELD_OUT_FRACTION * len(ranked)))]
    return frozenset(chosen)
