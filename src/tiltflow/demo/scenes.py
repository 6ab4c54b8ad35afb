"""Drawn scenes: flat coloured shapes on a plain background, sampled to match a GenEval metadata line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tiltflow.demo.vocabulary import BACKGROUND, COLORS, IMAGE_SIZE, Color, Relation, Shape

SUPERSAMPLING: Final = 4
BORDER: Final = 1.5  # pixels kept free at the image edge
GAP: Final = 2.0  # pixels kept free between two objects
RADII: Final[dict[int, tuple[float, float]]] = {1: (10.0, 16.0), 2: (9.0, 12.5), 3: (8.0, 10.5), 4: (7.0, 9.0)}
COLOR_JITTER: Final = 8
LAYOUT_ATTEMPTS: Final = 2_000
# Unit direction of the placed object, seen from the object it is related to (y points down).
DIRECTIONS: Final[dict[Relation, tuple[float, float]]] = {
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape, centred at (x, y) with half its extent `radius`, all in pixels of the 64x64 image.

    Example: `SceneObject("circle", "red", x=20.0, y=40.0, radius=10.0)`.
    """

    shape: Shape
    color: Color
    x: float
    y: float
    radius: float


def outline(shape: Shape) -> list[NDArray[np.float64]]:
    """Return the polygons of `shape` in the square [-1, 1]^2, each `[N, 2]`; a second polygon is a hole."""
    match shape:
        case "circle":
            return [_regular(48, 1.0)]
        case "ring":
            return [_regular(48, 1.0), _regular(48, 0.5)]
        case "square":
            return [np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])]
        case "triangle":
            return [np.array([(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)])]
        case "star":
            angles = np.arange(10) * math.pi / 5 - math.pi / 2
            reach = np.where(np.arange(10) % 2 == 0, 1.1, 0.5)
            return [np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=1)]
        case "cross":
            a, b = 0.34, 0.98
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
            return [np.array([*corners, (-b, -a), (-a, -a)])]


def draw_scene(
    objects: Sequence[SceneObject], *, rng: np.random.Generator | None = None, size: int = IMAGE_SIZE
) -> NDArray[np.uint8]:
    """Draw objects over the background with anti-aliased edges.

    Args:
        objects: What to draw, first object at the bottom.
        rng: Jitters every colour a little; None draws the exact palette.
        size: Side of the square image in pixels.

    Returns:
        RGB image, uint8 `[size, size, 3]`.
    """
    scale = size / IMAGE_SIZE * SUPERSAMPLING
    canvas = np.full((size * SUPERSAMPLING, size * SUPERSAMPLING, 3), BACKGROUND, dtype=np.uint8)
    for item in objects:
        color = np.array(COLORS[item.color], dtype=np.int64)
        if rng is not None:
            color = color + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3)
        polygons = [
            np.round((points * item.radius + (item.x, item.y)) * scale).astype(np.int32)
            for points in outline(item.shape)
        ]
        cv2.fillPoly(canvas, polygons, [int(c) for c in np.clip(color, 0, 255)])
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.uint8)


def sample_scene(metadata: Mapping[str, Any], rng: np.random.Generator) -> list[SceneObject]:
    """Sample objects that satisfy `metadata` exactly: its classes, counts, colours and relation, nothing else.

    Args:
        metadata: One GenEval line (`include` with `class`, `count`, optional `color` and `position`).
        rng: Source of all randomness.

    Raises:
        ValueError: No layout was found, which means that the metadata asks for more objects than fit.
    """
    kinds: list[tuple[Any, Any]] = []
    relation: Relation | None = None
    for clause in metadata["include"]:
        shared = clause.get("color") or (_random_color(rng) if rng.random() < 0.5 else None)
        kinds += [(clause["class"], shared or _random_color(rng)) for _ in range(clause["count"])]
        relation = clause["position"][0] if "position" in clause else relation
    for _ in range(LAYOUT_ATTEMPTS if len(kinds) in RADII else 0):
        layout = _place(len(kinds), relation, rng)
        if layout is not None:
            return [SceneObject(shape, color, *place) for (shape, color), place in zip(kinds, layout, strict=True)]
    raise ValueError(f"no room for {len(kinds)} objects: {metadata.get('prompt', metadata)!r}")


def _place(count: int, relation: Relation | None, rng: np.random.Generator) -> list[tuple[float, float, float]] | None:
    """Try once to place `count` discs (x, y, radius); with a relation, the second stands so to the first."""
    low, high = RADII[count]
    placed: list[tuple[float, float, float]] = []
    for index in range(count):
        radius = float(rng.uniform(low, high))
        if relation is not None and index == 1:
            x, y = _beside(placed[0], radius, relation, rng)
        else:
            x, y = rng.uniform(radius + BORDER, IMAGE_SIZE - radius - BORDER, 2).tolist()
        inside = all(radius + BORDER <= c <= IMAGE_SIZE - radius - BORDER for c in (x, y))
        apart = all(math.hypot(x - a, y - b) >= 1.05 * (radius + r) + GAP for a, b, r in placed)
        if not (inside and apart):
            return None
        placed.append((x, y, radius))
    return placed


def _beside(
    anchor: tuple[float, float, float], radius: float, relation: Relation, rng: np.random.Generator
) -> tuple[float, float]:
    """Return a centre in `relation` to `anchor`, at most 20 degrees off its axis."""
    distance = float(rng.uniform(1.15, 1.9)) * (anchor[2] + radius) + GAP
    angle = math.radians(float(rng.uniform(-20, 20)))
    dx, dy = DIRECTIONS[relation]
    return (
        anchor[0] + distance * (dx * math.cos(angle) - dy * math.sin(angle)),
        anchor[1] + distance * (dx * math.sin(angle) + dy * math.cos(angle)),
    )


def _random_color(rng: np.random.Generator) -> Color:
    return list(COLORS)[int(rng.integers(len(COLORS)))]


def _regular(corners: int, radius: float) -> NDArray[np.float64]:
    angles = np.arange(corners) * 2 * math.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
