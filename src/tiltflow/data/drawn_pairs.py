"""Pairs of drawn images, as a config asks for them; the demo room, which lies above this one, draws them."""

from importlib import import_module
from typing import Final, Literal

from pydantic import Field

from tiltflow.data.pair_sources import PairSource
from tiltflow.types import Config

_DRAWN: Final = "tiltflow.demo.preferences"  # imported when asked for


Flaw = Literal["color", "shape", "count", "position"]


class DrawnPairs(Config):
    """Pairs of drawn scenes of which one is what its prompt says and the other is not."""

    pairs: int = Field(default=20_000, ge=1)
    prompts: Literal["train", "test"] = "train"  # test: prompts that no training pair has
    ties: float = Field(default=0.1, ge=0, le=1)  # share of pairs of which both are right
    degraded: float = Field(default=0.2, ge=0, le=1)  # share, of the rest, of which one is blurred, noisy or compressed
    label_noise: float = Field(default=0.0, ge=0, le=0.5)  # share of preferences that are the wrong way round
    flaws: tuple[Flaw, ...] = Field(default=("color", "shape", "count", "position"), min_length=1)  # of the others
    seed: int = Field(default=0, ge=0)


def draw_pairs(options: DrawnPairs) -> PairSource:
    """Return the pairs; they are drawn when they are asked for, the same each time."""
    source: PairSource = import_module(_DRAWN).DrawnPreferences(options)
    return source
