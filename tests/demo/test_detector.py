"""The pixel-reading detector on clean drawn scenes: it must be right on at least 99% of them."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.demo.random_scenes import random_scene
from tiltflow.demo.detector import ShapeDetector, detect_shapes
from tiltflow.demo.prompts import all_prompts
from tiltflow.demo.scenes import SUPERSAMPLING, SceneObject, draw_scene, outline, sample_scene
from tiltflow.demo.vocabulary import BACKGROUND, COLORS, SHAPES
from tiltflow.rewards.geneval import TAGS, score_detections

RIGHT = 0.99
RIGHT_PER_TAG = 0.98  # on so few scenes the rate of one tag is only known to within a per cent
SCENES_PER_TAG = 168  # of color_attr more: every third of its prompts


def contents(image: NDArray[np.uint8]) -> list[tuple[str, str]]:
    return sorted((found.shape, found.color) for found in detect_shapes(image))


def drawn(scene: list[SceneObject]) -> list[tuple[str, str]]:
    return sorted((item.shape, item.color) for item in scene)


def extent(item: SceneObject) -> NDArray[np.float64]:
    """Return x1, y1, x2, y2 of a drawn object in pixels, measured on the fine canvas that it is drawn on."""
    points = np.round((outline(item.shape)[0] * item.radius + (item.x, item.y)) * SUPERSAMPLING)
    return np.concatenate([points.min(axis=0), points.max(axis=0) + 1]) / SUPERSAMPLING


@cache
def judged(tag: str) -> tuple[int, int, int]:
    """Return scenes, scenes that are correct and strict, and scenes of exactly the drawn shapes, for one tag."""
    rng = np.random.default_rng(TAGS.index(tag))
    lines = [line for line in all_prompts() if line["tag"] == tag]
    lines = lines[::3] if len(lines) > SCENES_PER_TAG else lines * -(-SCENES_PER_TAG // len(lines))
    detector = ShapeDetector()
    passed = exact = 0
    for line in lines:
        scene = sample_scene(line, rng)
        image = draw_scene(scene, rng=rng)
        result = score_detections(detector([image])[0], line)
        passed += result.correct and result.strict
        exact += contents(image) == drawn(scene)
    return len(lines), passed, exact


@pytest.mark.parametrize("tag", TAGS)
def test_a_clean_scene_of_each_tag_is_judged_right(tag: str) -> None:
    scenes, passed, exact = judged(tag)
    assert passed >= RIGHT_PER_TAG * scenes, f"{tag}: {passed} of {scenes} clean scenes are correct and strict"
    assert exact >= RIGHT_PER_TAG * scenes, f"{tag}: {exact} of {scenes} clean scenes are read exactly"


def test_the_measured_rate_over_a_thousand_clean_scenes_of_all_tags() -> None:
    scenes, passed, exact = (sum(column) for column in zip(*map(judged, TAGS), strict=True))
    assert scenes >= 1000
    assert passed / scenes >= RIGHT, f"correct and strict: {passed / scenes:.4f} of {scenes} clean scenes"
    assert exact / scenes >= RIGHT, f"read exactly: {exact / scenes:.4f} of {scenes} clean scenes"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_random_scenes_are_read_exactly(count: int) -> None:
    rng = np.random.default_rng(count)
    right = 0
    for _ in range(200):
        scene = random_scene(rng, count=count)
        right += contents(draw_scene(scene, rng=rng)) == drawn(scene)
    assert right >= RIGHT * 200, f"{right} of 200 scenes of {count} objects are read exactly"


def test_larger_images_are_read_too() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(60)]
    right = sum(contents(draw_scene(scene, rng=rng, size=128)) == drawn(scene) for scene in scenes)
    assert right >= RIGHT * 60, f"{right} of 60 scenes of 128 pixels are read exactly"


def test_the_label_s_score_is_high_on_clean_scenes() -> None:
    rng = np.random.default_rng(0)
    scores = [found.score for _ in range(60) for found in detect_shapes(draw_scene(random_scene(rng), rng=rng))]
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert np.mean(np.array(scores) > 0.9) > 0.98


def test_boxes_are_within_a_pixel_and_a_half_of_the_drawn_extent() -> None:
    rng = np.random.default_rng(3)
    errors = []
    for _ in range(150):
        scene = random_scene(rng)
        boxes = [np.array(found.box) for found in detect_shapes(draw_scene(scene, rng=rng))]
        errors += [min(np.abs(box - extent(item)).max() for box in boxes) for item in scene]
    assert len(errors) > 300
    within = np.mean(np.array(errors) <= 1.5)
    assert within >= RIGHT, f"{within:.4f} of {len(errors)} boxes"
    assert max(errors) <= 2.0  # the tip of a small star is thinner than a pixel


def test_masks_cover_the_drawn_pixels_and_lie_in_their_boxes() -> None:
    rng = np.random.default_rng(4)
    overlaps = []
    for _ in range(60):
        scene = random_scene(rng, count=2)
        truth = [(draw_scene([item]) != BACKGROUND).any(axis=2) for item in scene]
        for found in detect_shapes(draw_scene(scene, rng=rng)):
            assert found.mask.shape == (64, 64)
            assert found.mask.dtype == np.bool_
            x1, y1, x2, y2 = found.box
            assert found.mask.sum() == found.mask[y1:y2, x1:x2].sum()
            assert all(found.mask[y1:y2, x1:x2].any(axis=axis)[edge] for axis in (0, 1) for edge in (0, -1))
            overlaps.append(max((found.mask & drawn).sum() / (found.mask | drawn).sum() for drawn in truth))
    assert len(overlaps) >= 118
    assert min(overlaps) > 0.7
    assert np.mean(overlaps) > 0.82


def test_masks_of_neighbours_never_overlap() -> None:
    scene = [
        SceneObject("square", "red", x=20.0, y=32.0, radius=10.0),
        SceneObject("square", "blue", x=41.0, y=32.0, radius=10.0),
    ]
    masks = [found.mask for found in detect_shapes(draw_scene(scene))]
    assert len(masks) == 2
    assert not (masks[0] & masks[1]).any()


@pytest.mark.parametrize("size", [64, 128])
def test_an_empty_background_has_no_detections(size: int) -> None:
    image = draw_scene([], size=size)
    assert detect_shapes(image) == []
    assert ShapeDetector()([image]) == [[]]


def test_noise_and_specks_on_the_background_are_no_objects() -> None:
    rng = np.random.default_rng(0)
    noisy = np.clip(np.array(BACKGROUND) + rng.integers(-6, 7, (64, 64, 3)), 0, 255).astype(np.uint8)
    assert detect_shapes(noisy) == []
    noisy[10:13, 10:13] = COLORS["red"]  # nine pixels
    assert detect_shapes(noisy) == []


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_colour_becomes_geneval_s_detection(shape: Any, color: Any) -> None:
    item = SceneObject(shape, color, x=30.0, y=34.0, radius=12.0)
    (found,) = ShapeDetector()([draw_scene([item])])[0]
    assert (found.label, found.color) == (shape, color)
    assert found.score > 0.9
    assert np.abs(np.array([found.x1, found.y1, found.x2, found.y2]) - extent(item)).max() <= 1.5


def test_best_score_first_and_one_list_per_image() -> None:
    rng = np.random.default_rng(9)
    images = [draw_scene(random_scene(rng, count=count), rng=rng) for count in (3, 1, 4)]
    found = ShapeDetector()(images)
    assert [len(objects) for objects in found] == [3, 1, 4]
    for objects in found:
        scores = [item.score for item in objects]
        assert scores == sorted(scores, reverse=True)
