"""Preferences between drawn scenes: what a prompt says against a wrong colour, shape, count or place, or bad pixels."""

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal, final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiltflow.data.drawn_pairs import DrawnPairs, Flaw
from tiltflow.data.geneval import TAGS, Metadata, content
from tiltflow.data.pair_sources import PairSource
from tiltflow.demo.dataset import TAG_WEIGHTS
from tiltflow.demo.prompts import split_prompts
from tiltflow.demo.scenes import draw_scene, sample_scene
from tiltflow.demo.vocabulary import COLORS, NUMBERS, SHAPES

Kind = Literal["tie", "degraded"] | Flaw
Pixels = NDArray[np.uint8]

# What can be wrong with a scene of each tag.
FLAWS: Final[Mapping[str, tuple[Flaw, ...]]] = {
    "single_object": ("shape",),
    "two_object": ("shape",),
    "counting": ("count", "count", "shape"),
    "colors": ("color", "color", "shape"),
    "position": ("position", "position", "shape"),
    "color_attr": ("color", "color", "shape"),
}
OPPOSITES: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPOILING_ATTEMPTS: Final = 20
SAME_LAYOUT: Final = 0.75  # share of wrong scenes whose objects stand where those of the right one do


@final
class DrawnPreferences(PairSource):
    """Pairs that are drawn when they are asked for; a pair depends on the seed and its place alone."""

    def __init__(self, options: DrawnPairs):
        """Decide every pair's prompt, flaw and label; draw nothing yet."""
        self._seed = options.seed
        rng = np.random.default_rng(options.seed)
        flaws: dict[str, list[Flaw]] = {tag: [flaw for flaw in FLAWS[tag] if flaw in options.flaws] for tag in TAGS}
        weights = np.array([TAG_WEIGHTS[tag] if flaws[tag] else 0.0 for tag in TAGS])
        tags = rng.choice(len(TAGS), size=options.pairs, p=weights / weights.sum())
        by_tag: dict[str, list[Metadata]] = {tag: [] for tag in TAGS}
        for line in split_prompts(options.prompts):
            by_tag[line["tag"]].append(line)
        # A scene of a held-out prompt that is only ever shown as the wrong one would teach that it is always wrong.
        self._unseen = frozenset(map(content, split_prompts("test") if options.prompts == "train" else ()))
        self.lines: list[Metadata] = []
        self.kinds: list[Kind] = []
        for tag in (TAGS[index] for index in tags):
            self.lines.append(by_tag[tag][int(rng.integers(len(by_tag[tag])))])
            tied, degraded, which = rng.random() < options.ties, rng.random() < options.degraded, rng.random()
            flaw: Kind = flaws[tag][int(which * len(flaws[tag]))]
            self.kinds.append("tie" if tied else "degraded" if degraded else flaw)
        better = rng.integers(2, size=options.pairs)
        flipped = rng.random(options.pairs) < options.label_noise
        tie = np.array([kind == "tie" for kind in self.kinds])
        self.better: list[int] = better.tolist()  # which image is the right one, whatever the label says
        super().__init__(
            f"drawn pairs ({options.prompts})",
            _labels(np.where(flipped, 1 - better, better), tie),
            labelled=np.ones(options.pairs, dtype=np.bool_),
            prompts=[line["prompt"] for line in self.lines],
        )

    def images(self, place: int) -> tuple[Tensor, Tensor]:
        """Draw both images of a pair, uint8 `[64, 64, 3]`."""
        right, wrong = draw_pair(self.lines[place], self.kinds[place], seed=(self._seed, place), unseen=self._unseen)
        pair = (right, wrong) if self.better[place] == 0 else (wrong, right)
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])

    def where(self, place: int) -> str:
        """Return the place, counted from 1."""
        return f"{self.name}, pair {place + 1}"


def draw_pair(
    line: Metadata, kind: Kind, *, seed: tuple[int, ...], unseen: Collection[str] = ()
) -> tuple[Pixels, Pixels]:
    """Draw a scene that is what `line` says, and one that is not: both RGB, uint8 `[64, 64, 3]`.

    Args:
        line: A prompt's metadata.
        kind: What is wrong with the second; "tie": nothing.
        seed: The same pair for the same seed.
        unseen: Contents that the wrong scene does not have, where another flaw of the kind is possible.
    """
    rng = np.random.default_rng((*seed, 0))
    right = _draw(line, (*seed, 1))
    match kind:
        case "tie":
            return right, _draw(line, (*seed, 2))
        case "degraded":
            other = right if rng.random() < SAME_LAYOUT else _draw(line, (*seed, 2))
            return right, degrade(other, rng)
        case _:
            layout = 1 if rng.random() < SAME_LAYOUT else 2
            return right, _draw(spoil(line, kind, rng, unseen=unseen), (*seed, layout))


def spoil(line: Metadata, kind: Kind, rng: np.random.Generator, *, unseen: Collection[str] = ()) -> Metadata:
    """Return metadata of a scene that is wrong in one respect.

    Args:
        line: A prompt's metadata.
        kind: "color", "shape", "count" or "position"; one of the tag's `FLAWS`.
        rng: Chooses the object and what it becomes.
        unseen: Contents that the scene does not have, where it can be spoilt to another one.

    Raises:
        ValueError: The scene has no such respect.
    """
    wrong = _spoil(line, kind, rng)
    for _ in range(SPOILING_ATTEMPTS):
        if content(wrong) not in unseen:
            break
        wrong = _spoil(line, kind, rng)
    return wrong


def degrade(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Blur an image, add noise to it, or compress it to a few hundred bytes; uint8 `[H, W, 3]`."""
    match int(rng.integers(3)):
        case 0:
            return cv2.GaussianBlur(image, (0, 0), float(rng.uniform(1.2, 3.0))).astype(np.uint8)
        case 1:
            noise = rng.normal(0.0, float(rng.uniform(20.0, 60.0)), image.shape)
            return np.clip(image + noise, 0, 255).astype(np.uint8)
        case _:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=int(rng.integers(3, 13)))
            with Image.open(buffer) as file:
                return np.array(file.convert("RGB"))


def _spoil(line: Metadata, kind: Kind, rng: np.random.Generator) -> Metadata:
    clauses = [dict(clause) for clause in line["include"]]
    clause = clauses[int(rng.integers(len(clauses)))]
    match kind:
        case "color":
            clause["color"] = _other(list(COLORS), [clause["color"]], rng)
        case "shape":
            clause["class"] = _other(SHAPES, [each["class"] for each in clauses], rng)
        case "count":
            clause["count"] = _other((1, *NUMBERS), [clause["count"]], rng, near=clause["count"])
        case "position":
            related = clauses[-1]
            relation, target = related["position"]
            related["position"] = [OPPOSITES[relation], target]
        case _:
            raise ValueError(f"a scene cannot be spoilt by {kind!r}; choose color, shape, count or position")
    return {**line, "include": clauses}


def _draw(line: Metadata, seed: tuple[int, ...]) -> Pixels:
    rng = np.random.default_rng(seed)
    return draw_scene(sample_scene(line, rng), rng=rng)


def _other(choices: Sequence[Any], taken: Sequence[Any], rng: np.random.Generator, *, near: int | None = None) -> Any:
    """Choose what is not taken, next to `near` if that is given."""
    left = [choice for choice in choices if choice not in taken and (near is None or abs(choice - near) == 1)]
    return left[int(rng.integers(len(left)))]


def _labels(better: NDArray[Any], tie: NDArray[np.bool_]) -> NDArray[np.float64]:
    first = np.where(tie, 0.5, 1.0 - better)
    return np.stack([first, 1.0 - first], axis=1)
