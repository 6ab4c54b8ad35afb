"""A detector that reads drawn scenes from their pixels: palette segmentation, then the best-fitting outline."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tiltflow.demo.scenes import outline
from tiltflow.demo.vocabulary import BACKGROUND, COLORS, SHAPES, Color, Shape
from tiltflow.rewards.geneval import Detection
from tiltflow.rewards.geneval_reward import KnownClasses

MIN_AREA: Final = 24  # pixels of a 64x64 image; smaller blobs are specks
TEMPLATE: Final = 32  # side of the normalised mask that outlines are compared on
TEMPERATURE: Final = 0.02  # of the softmax over outline overlaps
GOOD_OVERLAP: Final = 0.75  # overlap from which a shape counts as cleanly drawn


@dataclass(frozen=True)
class DetectedShape:
    """One shape found in an image; box in pixels, x2/y2 exclusive.

    Example: `DetectedShape("circle", "red", (10, 30, 31, 51), 0.99, mask)`.
    """

    shape: Shape
    color: Color
    box: tuple[int, int, int, int]
    score: float  # in [0, 1]
    mask: NDArray[np.bool_]  # [H, W]


def detect_shapes(image: NDArray[np.uint8]) -> list[DetectedShape]:
    """Find every coloured shape in an RGB image, uint8 `[H, W, 3]`, best score first."""
    found: list[DetectedShape] = []
    for color, mask in _colored_regions(image):
        ys, xs = np.nonzero(mask)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        shape, score = _classify(mask[box[1] : box[3], box[0] : box[2]])
        found.append(DetectedShape(shape, color, box, score, mask))
    return sorted(found, key=lambda item: -item.score)


def _colored_regions(image: NDArray[np.uint8]) -> list[tuple[Color, NDArray[np.bool_]]]:
    """Split an image into connected regions of one palette colour, anti-aliased edges included."""
    palette = _palette_lab()
    lab = cv2.cvtColor(np.ascontiguousarray(image).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    nearest = np.linalg.norm(lab[:, :, None] - palette, axis=3).argmin(axis=2)  # [H, W]; 0 is the background
    kernel = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    area_scale = image.shape[0] * image.shape[1] / 64**2
    regions: list[tuple[Color, NDArray[np.bool_]]] = []
    seeds = np.zeros(nearest.shape, dtype=np.int32)
    for index, color in enumerate(COLORS, start=1):
        core = cv2.morphologyEx((nearest == index).astype(np.uint8), cv2.MORPH_OPEN, kernel)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=8)
        for label in range(1, count):
            if stats[label, cv2.CC_STAT_AREA] >= MIN_AREA * area_scale:
                regions.append((color, labels == label))
                seeds[labels == label] = len(regions)
    if not regions:
        return []
    return _with_edges(regions, seeds, foreground=nearest > 0)


def _with_edges(
    regions: list[tuple[Color, NDArray[np.bool_]]], seeds: NDArray[np.int32], *, foreground: NDArray[np.bool_]
) -> list[tuple[Color, NDArray[np.bool_]]]:
    """Give every foreground pixel within two pixels of a region's core to the nearest core."""
    distance, labels = cv2.distanceTransformWithLabels(
        (seeds == 0).astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner_of_label = np.zeros(int(labels.max()) + 1, dtype=np.int32)
    owner_of_label[labels[seeds > 0]] = seeds[seeds > 0]
    owner = np.where(foreground & (distance <= 2), owner_of_label[labels], 0)
    return [(color, owner == index) for index, (color, _) in enumerate(regions, start=1)]


def _classify(mask: NDArray[np.bool_]) -> tuple[Shape, float]:
    """Name the outline that overlaps a cropped mask best; the score is its softmax share times its cleanness."""
    stretched = cv2.resize(mask.astype(np.float32), (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA)
    templates = _templates()  # [S, T, T]
    overlap = np.minimum(stretched, templates).sum(axis=(1, 2)) / np.maximum(stretched, templates).sum(axis=(1, 2))
    aspect = min(mask.shape) / max(mask.shape)
    logits = (overlap - overlap.max()) / TEMPERATURE
    share = np.exp(logits) / np.exp(logits).sum()
    best = int(overlap.argmax())
    cleanness = min(1.0, float(overlap[best]) * min(1.0, aspect / 0.75) / GOOD_OVERLAP)
    return SHAPES[best], float(share[best]) * cleanness


@lru_cache(maxsize=1)
def _templates() -> NDArray[np.float32]:
    """Return each shape's mask stretched to its bounding box, `[S, TEMPLATE, TEMPLATE]`."""
    masks = []
    for shape in SHAPES:
        canvas = np.zeros((256, 256), dtype=np.uint8)
        cv2.fillPoly(canvas, [np.round(points * 110 + 128).astype(np.int32) for points in outline(shape)], 1)
        ys, xs = np.nonzero(canvas)
        crop = canvas[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32)
        masks.append(cv2.resize(crop, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA))
    return np.stack(masks)


@lru_cache(maxsize=1)
def _palette_lab() -> NDArray[np.float32]:
    """Return background and colours in CIE Lab, `[1 + C, 3]`."""
    rgb = np.array([BACKGROUND, *COLORS.values()], dtype=np.float32)[None] / 255
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]


class ShapeDetector(KnownClasses):
    """The detector of the drawn world as the GenEval reward asks for one."""

    classes = SHAPES
    colors = tuple(COLORS)

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Detection]]:
        """Return the shapes of each RGB image, uint8 `[H, W, 3]`."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV and NumPy let go of the interpreter while they work
            return [[_as_detection(shape) for shape in found] for found in pool.map(detect_shapes, images)]


def _as_detection(found: DetectedShape) -> Detection:
    x1, y1, x2, y2 = (float(edge) for edge in found.box)
    return Detection(found.shape, x1, y1, x2, y2, found.score, found.color)
