"""The drawn world's prompts: all six tags, and two splits that share no picture."""

from collections import Counter
from typing import Any

import pytest

from tiltflow.demo.dataset import DrawnScenes
from tiltflow.demo.prompts import all_prompts, split_prompts
from tiltflow.demo.vocabulary import COLORS, SHAPES
from tiltflow.rewards.geneval import TAGS

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {"single_object": 6, "two_object": 30, "counting": 18, "colors": 48, "position": 120, "color_attr": 1680}


def pictures(line: Any) -> list[tuple[Any, ...]]:
    """Return every way to write down what a line shows, without the package's own notion of it."""
    clauses = [(c["class"], c["count"], c.get("color")) for c in line["include"]]
    if line["tag"] != "position":
        return [(line["tag"], *clauses), (line["tag"], *reversed(clauses))]
    target, thing = clauses
    relation = line["include"][1]["position"][0]
    return [(thing, relation, target), (target, INVERSE[relation], thing)]


def test_every_prompt_of_the_world_once() -> None:
    lines = all_prompts()
    assert Counter(line["tag"] for line in lines) == COUNTS
    assert len({line["prompt"] for line in lines}) == len(lines) == 1902


def test_lines_are_in_geneval_s_form() -> None:
    for line in all_prompts():
        assert set(line) == {"tag", "include", "prompt"} | ({"exclude"} if line["tag"] == "counting" else set())
        for clause in line["include"]:
            assert clause["class"] in SHAPES
            assert clause.get("color", "red") in COLORS
        assert len({clause["class"] for clause in line["include"]}) == len(line["include"])


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("a photo of a star", {"tag": "single_object", "include": [{"class": "star", "count": 1}]}),
        (
            "a photo of three crosses",
            {
                "tag": "counting",
                "include": [{"class": "cross", "count": 3}],
                "exclude": [{"class": "cross", "count": 4}],
            },
        ),
        ("a photo of an orange ring", {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "orange"}]}),
        (
            "a photo of a circle above a square",
            {
                "tag": "position",
                "include": [
                    {"class": "square", "count": 1},
                    {"class": "circle", "count": 1, "position": ["above", 0]},
                ],
            },
        ),
        (
            "a photo of a red star and a blue ring",
            {
                "tag": "color_attr",
                "include": [
                    {"class": "star", "count": 1, "color": "red"},
                    {"class": "ring", "count": 1, "color": "blue"},
                ],
            },
        ),
    ],
)
def test_examples(prompt: str, line: dict[str, Any]) -> None:
    assert [found for found in all_prompts() if found["prompt"] == prompt] == [{**line, "prompt": prompt}]


def test_the_splits_are_the_world() -> None:
    train, test = (split_prompts(split) for split in ("train", "test"))
    assert len(train) + len(test) == 1902
    assert {line["prompt"] for line in (*train, *test)} == {line["prompt"] for line in all_prompts()}


def test_no_evaluation_prompt_is_trained_on_not_even_in_other_words() -> None:
    held_out = {picture for line in split_prompts("test") for picture in pictures(line)}
    trained = {picture for line in split_prompts("train") for picture in pictures(line)}
    assert not held_out & trained


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_holds_out_a_fifth(tag: str) -> None:
    held_out = sum(line["tag"] == tag for line in split_prompts("test"))
    assert held_out == pytest.approx(0.2 * COUNTS[tag], abs=1)
    assert held_out >= 1


def test_the_split_never_changes() -> None:
    singles = [line["prompt"] for line in split_prompts("test") if line["tag"] == "single_object"]
    counts = [line["prompt"] for line in split_prompts("test") if line["tag"] == "counting"]
    assert singles == ["a photo of a star"]
    assert counts == [
        "a photo of four circles",
        "a photo of four squares",
        "a photo of two triangles",
        "a photo of three stars",
    ]


def test_pretraining_draws_training_prompts_only_and_knows_every_word() -> None:
    source = DrawnScenes()
    assert set(source.captions) == {line["prompt"] for line in all_prompts()}
    images, captions = source.draw(120, seed=5)
    assert tuple(images.shape) == (120, 3, 64, 64)
    assert not set(captions) & {line["prompt"] for line in split_prompts("test")}
    tags = {line["prompt"]: line["tag"] for line in all_prompts()}
    assert {tags[caption] for caption in captions} == set(TAGS)


def test_the_same_seed_draws_the_same_scenes() -> None:
    source = DrawnScenes()
    (first, captions), (again, same), (other, _) = (source.draw(6, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert captions == same
    assert (first != other).any()
