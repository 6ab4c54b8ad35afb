"""GenEval's prompt format: the official lines rebuilt, and training prompts that never touch them."""

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest

from tests.shared import SHARED, requires_shared
from tiltflow.data import geneval, load_prompts
from tiltflow.data.geneval import OBJECTS, TAGS, content, generate_prompts
from tiltflow.types import Prompt

# The official list adds an s to everything.
OFFICIAL_PLURALS = {
    "toothbrushs": "toothbrushes",
    "persons": "people",
    "sheeps": "sheep",
    "sandwichs": "sandwiches",
    "knifes": "knives",
    "benchs": "benches",
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@lru_cache(maxsize=1)
def official() -> list[Prompt]:
    return load_prompts("geneval", split="test")


@lru_cache(maxsize=1)
def training() -> list[Prompt]:
    return load_prompts("geneval", split="train")


def rebuilt(line: Any) -> dict[str, Any]:
    first, *rest = line["include"]
    match line["tag"]:
        case "single_object":
            return geneval.single_object(first["class"])
        case "two_object":
            return geneval.two_object(first["class"], rest[0]["class"])
        case "counting":
            return geneval.counting(first["class"], first["count"])
        case "colors":
            return geneval.colors(first["class"], first["color"])
        case "position":
            return geneval.position(rest[0]["class"], rest[0]["position"][0], first["class"])
        case _:
            return geneval.color_attr(first["class"], first["color"], rest[0]["class"], rest[0]["color"])


def pictures(line: Any) -> list[tuple[Any, ...]]:
    """Return every way to write down what a line shows, without the package's own notion of it."""
    clauses = [(c["class"], c["count"], c.get("color")) for c in line["include"]]
    if line["tag"] != "position":
        return [(line["tag"], tuple(clauses)), (line["tag"], tuple(reversed(clauses)))]
    target, thing = clauses
    relation = line["include"][1]["position"][0]
    return [(thing, relation, target), (target, INVERSE[relation], thing)]


# --- the official lines -----------------------------------------------------------------------------------------------


def test_the_builders_reproduce_the_official_lines_but_for_six_wrong_plurals() -> None:
    wrong = set()
    for prompt in official():
        line = rebuilt(prompt.metadata)
        assert {key: value for key, value in line.items() if key != "prompt"} == prompt.metadata
        if line["prompt"] != prompt.text:
            ours, theirs = line["prompt"].split()[-1], prompt.text.split()[-1]
            assert line["prompt"].split()[:-1] == prompt.text.split()[:-1]
            assert OFFICIAL_PLURALS[theirs] == ours
            wrong.add(theirs)
    assert wrong == set(OFFICIAL_PLURALS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bus", "buses"),
        ("knife", "knives"),
        ("skis", "skis"),
        ("scissors", "scissors"),
        ("sheep", "sheep"),
        ("person", "people"),
        ("computer mouse", "computer mice"),
        ("toothbrush", "toothbrushes"),
        ("couch", "couches"),
        ("wine glass", "wine glasses"),
        ("toy", "toys"),
        ("berry", "berries"),
        ("cross", "crosses"),
        ("circle", "circles"),
    ],
)
def test_plural(name: str, expected: str) -> None:
    assert geneval.plural(name) == expected


def test_articles() -> None:
    assert geneval.single_object("umbrella")["prompt"] == "a photo of an umbrella"
    assert geneval.colors("bench", "orange")["prompt"] == "a photo of an orange bench"
    assert geneval.position("apple", "left of", "cow")["prompt"] == "a photo of an apple left of a cow"


@requires_shared
def test_objects_are_the_detectors_classes_in_its_order() -> None:
    names = (SHARED / "data" / "prompts" / "object_names.txt").read_text().split("\n")
    assert list(OBJECTS) == [name for name in names if name]
    assert len(OBJECTS) == 80


# --- the same picture -------------------------------------------------------------------------------------------------


def test_content_is_the_same_for_both_orders() -> None:
    assert content(geneval.two_object("cat", "dog")) == content(geneval.two_object("dog", "cat"))
    one = content(geneval.color_attr("cat", "red", "dog", "blue"))
    assert one == content(geneval.color_attr("dog", "blue", "cat", "red"))
    assert one != content(geneval.color_attr("cat", "blue", "dog", "red"))


@pytest.mark.parametrize("relation", INVERSE)
def test_content_is_the_same_for_a_relation_and_its_inverse(relation: str) -> None:
    one = content(geneval.position("cat", relation, "dog"))
    assert one == content(geneval.position("dog", INVERSE[relation], "cat"))
    assert one != content(geneval.position("dog", relation, "cat"))
    assert one != content(geneval.two_object("cat", "dog"))


def test_content_differs_between_counts() -> None:
    assert content(geneval.counting("cat", 2)) != content(geneval.counting("cat", 3))


# --- training prompts -------------------------------------------------------------------------------------------------


def test_training_prompts_never_show_what_an_evaluation_prompt_shows() -> None:
    forbidden = {picture for prompt in official() for picture in pictures(prompt.metadata)}
    assert len(forbidden) > 553  # both ways of writing a pair are in it
    shown = {picture for prompt in training() for picture in pictures(prompt.metadata)}
    assert not forbidden & shown


def test_training_prompts_keep_the_published_shares() -> None:
    tags = Counter(prompt.metadata["tag"] for prompt in training())
    assert sum(tags.values()) == 50_000
    shares = {"position": 7, "counting": 5, "color_attr": 3, "two_object": 1, "colors": 1, "single_object": 0}
    for tag, share in shares.items():
        p = share / 17
        sigma = (50_000 * p * (1 - p)) ** 0.5
        assert abs(tags[tag] - 50_000 * p) <= 3 * sigma, (tag, tags[tag], 50_000 * p)


def test_training_prompts_repeat_only_where_too_few_exist() -> None:
    written = Counter((prompt.metadata["tag"], prompt.text) for prompt in training())
    assert {tag for (tag, _), times in written.items() if times > 1} == {"counting", "colors"}


def test_training_lines_are_in_geneval_s_form() -> None:
    for prompt in training()[:2000]:
        line = {**prompt.metadata, "prompt": prompt.text}
        assert rebuilt(line) == line
        assert line["tag"] in TAGS
        assert all(clause["class"] in OBJECTS for clause in line["include"])
        assert not any(clause["class"] == "person" and "color" in clause for clause in line["include"])


def test_same_seed_same_lines() -> None:
    assert generate_prompts(50, seed=4) == generate_prompts(50, seed=4)
    assert generate_prompts(50, seed=4) != generate_prompts(50, seed=5)


def test_asking_for_more_lines_than_there_are() -> None:
    assert len({line["prompt"] for line in generate_prompts(40, seed=0, shares={"single_object": 1})}) == 40
    with pytest.raises(ValueError, match="not so many different prompts of the tag 'single_object'; ask for fewer"):
        generate_prompts(81, seed=0, shares={"single_object": 1})
