"""Drawn scenes: the world's vocabulary, deterministic drawing, and layouts that show what the prompt says."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.demo.random_scenes import random_scene
from tiltflow.demo.prompts import all_prompts
from tiltflow.demo.scenes import SceneObject, draw_scene, outline, sample_scene
from tiltflow.demo.vocabulary import BACKGROUND, COLORS, IMAGE_SIZE, NUMBERS, RELATIONS, SHAPES
from tiltflow.rewards.geneval import COLORS as GENEVAL_COLORS
from tiltflow.rewards.geneval import TAGS

RED_CIRCLE = SceneObject("circle", "red", x=20.0, y=40.0, radius=10.0)


def lines_of(tag: str) -> list[dict[str, Any]]:
    return [line for line in all_prompts() if line["tag"] == tag]


def test_the_world_is_large_enough() -> None:
    assert len(SHAPES) >= 6
    assert len(COLORS) >= 8
    assert set(COLORS) <= set(GENEVAL_COLORS)
    assert NUMBERS == (2, 3, 4)
    assert RELATIONS == ("left of", "right of", "above", "below")
    assert IMAGE_SIZE == 64


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_an_empty_scene_is_the_background() -> None:
    image = draw_scene([])
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert (image == BACKGROUND).all()


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_palette_colour_where_it_was_put(shape: Any, color: Any) -> None:
    image = draw_scene([SceneObject(shape, color, x=30.0, y=36.0, radius=14.0)])
    ys, xs = np.nonzero((image == COLORS[color]).all(axis=2))
    assert len(xs) > 100
    assert xs.min() >= 30 - 1.1 * 14 - 1
    assert xs.max() <= 30 + 1.1 * 14 + 1
    assert ys.min() >= 36 - 1.1 * 14 - 1
    assert ys.max() <= 36 + 1.1 * 14 + 1


def test_a_circle_covers_its_area() -> None:
    covered = (draw_scene([RED_CIRCLE]).astype(float) - BACKGROUND)[..., 1].sum() / (COLORS["red"][1] - BACKGROUND[1])
    assert covered == pytest.approx(np.pi * 10**2, rel=0.05)


def test_a_ring_has_a_hole() -> None:
    image = draw_scene([SceneObject("ring", "blue", x=32.0, y=32.0, radius=14.0)])
    assert tuple(image[32, 32]) == BACKGROUND
    assert tuple(image[32, 32 + 10]) == COLORS["blue"]


def test_the_last_object_lies_on_top() -> None:
    image = draw_scene([RED_CIRCLE, SceneObject("square", "green", x=20.0, y=40.0, radius=5.0)])
    assert tuple(image[40, 20]) == COLORS["green"]
    assert tuple(image[40, 27]) == COLORS["red"]


def test_edges_are_anti_aliased() -> None:
    image = draw_scene([RED_CIRCLE])
    pure = (image == BACKGROUND).all(axis=2) | (image == COLORS["red"]).all(axis=2)
    assert 20 < (~pure).sum() < 120


def test_drawing_is_deterministic_and_jitter_comes_from_the_generator() -> None:
    scene = random_scene(np.random.default_rng(0), count=4)
    assert (draw_scene(scene) == draw_scene(scene)).all()
    first, again, other = (draw_scene(scene, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert np.abs(first.astype(int) - draw_scene(scene)).max() <= 8


def test_a_larger_canvas_shows_the_same_scene() -> None:
    small, large = draw_scene([RED_CIRCLE]), draw_scene([RED_CIRCLE], size=128)
    assert large.shape == (128, 128, 3)
    shrunk = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_stay_near_the_unit_square(shape: Any) -> None:
    for polygon in outline(shape):
        assert polygon.ndim == 2
        assert np.abs(polygon).max() <= 1.1


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_hold_what_the_metadata_asks_for_and_nothing_else(tag: str) -> None:
    rng = np.random.default_rng(0)
    lines = lines_of(tag)
    for line in lines[:: max(1, len(lines) // 60)]:
        scene = sample_scene(line, rng)
        wanted = Counter({clause["class"]: clause["count"] for clause in line["include"]})
        assert Counter(item.shape for item in scene) == wanted
        for clause in line["include"]:
            if "color" in clause:
                assert {item.color for item in scene if item.shape == clause["class"]} == {clause["color"]}


@pytest.mark.parametrize("relation", RELATIONS)
def test_scenes_satisfy_the_relation(relation: str) -> None:
    rng = np.random.default_rng(0)
    lines = [line for line in lines_of("position") if line["include"][1]["position"][0] == relation]
    assert len(lines) == 30
    for line in lines * 3:
        target, thing = sample_scene(line, rng)
        assert (thing.shape, target.shape) == (line["include"][1]["class"], line["include"][0]["class"])
        dx, dy = thing.x - target.x, thing.y - target.y
        along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
        assert along > 0
        assert abs(across) < 0.37 * along, line["prompt"]  # tan 20 degrees


def test_objects_keep_apart_and_inside() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = random_scene(rng)
        for index, item in enumerate(scene):
            for centre in (item.x, item.y):
                assert item.radius + 1.5 <= centre <= 64 - item.radius - 1.5
            for other in scene[:index]:
                gap = np.hypot(item.x - other.x, item.y - other.y) - item.radius - other.radius
                assert gap >= 2.0


def test_same_generator_state_same_scene() -> None:
    line = lines_of("counting")[0]
    assert sample_scene(line, np.random.default_rng(7)) == sample_scene(line, np.random.default_rng(7))
    assert sample_scene(line, np.random.default_rng(7)) != sample_scene(line, np.random.default_rng(8))


def test_too_many_objects_is_an_error() -> None:
    line = {"include": [{"class": "circle", "count": 5}], "prompt": "a photo of five circles"}
    with pytest.raises(ValueError, match="no room for 5 objects: 'a photo of five circles'"):
        sample_scene(line, np.random.default_rng(0))
