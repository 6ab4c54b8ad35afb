"""GenEval's rules against the released code on 400 images, and the clean partial score by hand and at random."""

import random
from dataclasses import replace
from typing import Any

import pytest

from tests.shared import golden, requires_shared
from tiltflow.errors import DataError
from tiltflow.evaluation import estimate_stratified
from tiltflow.rewards.geneval import TAGS, Detection, GenevalResult, score_detections

CUP_AND_COW = {
    "tag": "position",
    "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a cup left of a cow",
}
COW = Detection("cow", 200, 200, 300, 300, 0.8, "white")
CUP_LEFT = Detection("cup", 20, 210, 100, 290, 0.7, "red")
CUP_RIGHT = replace(CUP_LEFT, x1=400, x2=480)


def golden_cases() -> list[dict[str, Any]]:
    cases = golden("scorers/geneval_logic")[0]["cases"]
    assert len(cases) == 400
    return cases


def detections_of(case: dict[str, Any]) -> list[Detection]:
    return [Detection(*row) for row in case["detections"]]


def cups(count: int, *, color: str | None = None, score: float = 0.95) -> list[Detection]:
    return [Detection("cup", 30.0 * i, 0, 30.0 * i + 20, 20, score - i / 1000, color) for i in range(count)]


def prompt(tag: str, *include: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **rest}


def partial(detections: list[Detection], metadata: dict[str, Any]) -> float:
    return score_detections(detections, metadata).partial


# --- golden -----------------------------------------------------------------------------------------------------------


@requires_shared
def test_golden_cases_with_the_reference_quirks() -> None:
    for case in golden_cases():
        result = score_detections(detections_of(case), case["metadata"], quirks="reference")
        expected = case["expected"]
        assert result.correct == expected["official_correct"], case["id"]
        assert result.strict == expected["strict_correct"], case["id"]
        assert result.partial == pytest.approx(expected["partial_score"], abs=1e-6), case["id"]
        assert set(result.reasons) == set(expected["official_reasons"]), case["id"]


@requires_shared
def test_clean_mode_changes_the_partial_score_alone_and_keeps_it_between_0_and_1() -> None:
    changed = 0
    for case in golden_cases():
        detections = detections_of(case)
        clean = score_detections(detections, case["metadata"])
        reference = score_detections(detections, case["metadata"], quirks="reference")
        assert clean == replace(reference, partial=clean.partial)
        assert 0 <= clean.partial <= 1
        assert (clean.partial == 1) == clean.strict, case["id"]
        changed += clean.partial != reference.partial
        if min(case["expected"]["partial_terms"]) >= 0 and "position" not in str(case["metadata"]["include"]):
            assert clean.partial == pytest.approx(reference.partial, abs=1e-12), case["id"]
        if "wrong_relation_scores_0.75" in case.get("quirks", []):
            assert clean.partial == pytest.approx(2 / 3), case["id"]
    assert changed >= 49 + 18  # every negative score and every wrong relation


@requires_shared
def test_golden_batch_output() -> None:
    batch, cases = golden("scorers/geneval_logic")[0]["batch_output"], golden_cases()[:12]
    results = [score_detections(detections_of(c), c["metadata"], quirks="reference") for c in cases]
    assert [r.partial for r in results] == pytest.approx(batch["scores"], abs=1e-6)
    assert [float(r.correct) for r in results] == batch["rewards"]
    assert [float(r.strict) for r in results] == batch["strict_rewards"]
    for key, field in (("group_rewards", "correct"), ("group_strict_rewards", "strict")):
        for tag, column in batch[key].items():
            for case, result, value in zip(cases, results, column, strict=True):
                mine = float(getattr(result, field)) if case["metadata"]["tag"] == tag else -10.0
                assert value == mine


@requires_shared
def test_golden_summary() -> None:
    summary, cases = golden("scorers/geneval_logic")[0]["summary"], golden_cases()
    results = [score_detections(detections_of(c), c["metadata"]) for c in cases]
    tags = [c["metadata"]["tag"] for c in cases]
    for name, hits in (("official", [r.correct for r in results]), ("strict", [r.strict for r in results])):
        by_tag = {tag: [hit for hit, each in zip(hits, tags, strict=True) if each == tag] for tag in TAGS}
        rates = {tag: sum(mine) / len(mine) for tag, mine in by_tag.items()}
        assert rates == pytest.approx(summary[f"{name}_accuracy_per_tag"], abs=1e-12)
        found = estimate_stratified(hits, range(len(hits)), tags)
        assert found.value == pytest.approx(summary[f"{name}_overall"], abs=1e-12)


@requires_shared
@pytest.mark.parametrize("quirks", ["clean", "reference"])
def test_the_order_of_detections_does_not_matter(quirks: Any) -> None:
    shuffler = random.Random(0)
    for case in golden_cases():
        detections = detections_of(case)
        expected = score_detections(detections, case["metadata"], quirks=quirks)
        shuffler.shuffle(detections)
        assert score_detections(detections, case["metadata"], quirks=quirks) == expected


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_order_does_not_matter_when_scores_tie() -> None:
    metadata = prompt("colors", {"class": "cup", "count": 1, "color": "red"})
    red, blue = Detection("cup", 0, 0, 9, 9, 0.9, "red"), Detection("cup", 50, 0, 59, 9, 0.9, "blue")
    assert score_detections([red, blue], metadata) == score_detections([blue, red], metadata)


def test_relation_is_worth_a_full_term() -> None:
    right = score_detections([COW, CUP_LEFT], CUP_AND_COW)
    wrong = score_detections([COW, CUP_RIGHT], CUP_AND_COW)
    assert right == GenevalResult(True, True, 1.0, ())
    assert wrong.partial == pytest.approx(2 / 3)
    assert not wrong.correct
    assert wrong.reasons == ("expected cup left of target, found right of target",)
    assert score_detections([COW, CUP_RIGHT], CUP_AND_COW, quirks="reference").partial == 0.75


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], 0.0),
        ([COW], 1 / 3),
        ([CUP_LEFT], 1 / 3),
        ([COW, CUP_RIGHT], 2 / 3),
        ([COW, replace(CUP_LEFT, x1=200, x2=300, y1=200, y2=300)], 2 / 3),  # on top of each other: no relation
        ([COW, replace(COW, x1=210, score=0.5), CUP_LEFT], 1 / 3),  # no single cow to be left of
        ([COW, CUP_LEFT, replace(CUP_LEFT, y1=10, y2=90, score=0.4)], 1 / 3),
        ([COW, CUP_LEFT], 1.0),
    ],
)
def test_clean_position_examples(detections: list[Detection], expected: float) -> None:
    assert partial(detections, CUP_AND_COW) == pytest.approx(expected, abs=1e-12)


def test_clean_counting_falls_with_the_distance_and_stops_at_zero() -> None:
    metadata = prompt("counting", {"class": "cup", "count": 3}, exclude=[{"class": "cup", "count": 4}])
    scores = [partial(cups(n), metadata) for n in range(9)]
    assert scores == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0, 0], abs=1e-12)
    reference = score_detections(cups(9), metadata, quirks="reference")
    assert reference.partial == pytest.approx(-1.0)


def test_clean_colour_examples() -> None:
    metadata = prompt("colors", {"class": "cup", "count": 2, "color": "red"})
    red, blue = cups(2, color="red"), cups(2, color="blue")
    assert partial(red, metadata) == 1
    assert partial([red[0], blue[1]], metadata) == 0.75
    assert partial(blue, metadata) == 0.5
    assert partial(cups(2), metadata) == 0.5  # a detection without a colour is not red
    assert partial(red[:1], metadata) == 0.25  # the number is wrong: no colour term


def test_clean_clause_with_colour_and_position_has_three_terms_whatever_was_found() -> None:
    metadata = prompt(
        "position",
        {"class": "cow", "count": 1},
        {"class": "cup", "count": 1, "color": "red", "position": ["left of", 0]},
    )
    blue_left, red_right = replace(CUP_LEFT, color="blue"), CUP_RIGHT
    assert partial([COW, CUP_LEFT], metadata) == 1
    assert partial([COW, red_right], metadata) == 0.75
    assert partial([COW, blue_left], metadata) == 0.5  # without its colour the relation earns nothing
    assert partial([COW], metadata) == 0.25


def test_clean_score_of_random_detections_is_between_0_and_1_and_1_only_when_strict() -> None:
    source = random.Random(1)
    words, relations = ["cow", "cup", "dog"], ["left of", "right of", "above", "below"]
    for _ in range(300):
        include = []
        for index, word in enumerate(words[: source.randint(1, 3)]):
            clause: dict[str, Any] = {"class": word, "count": source.randint(1, 3)}
            if source.random() < 0.5:
                clause["color"] = source.choice(["red", "blue"])
            if index and source.random() < 0.5:
                clause["position"] = [source.choice(relations), source.randrange(index)]
            include.append(clause)
        detections = [
            Detection(
                source.choice(words), x, y, x + 40, y + 30, source.uniform(0.2, 1.0), source.choice(["red", "blue"])
            )
            for x, y in [(source.uniform(0, 400), source.uniform(0, 400)) for _ in range(source.randint(0, 25))]
        ]
        result = score_detections(detections, prompt(source.choice(TAGS), *include))
        assert 0 <= result.partial <= 1
        assert (result.partial == 1) == result.strict
        assert result.correct == (not result.reasons)
        if result.strict:
            assert result.correct  # no exclude clause here


@pytest.mark.parametrize(("tag", "threshold"), [("single_object", 0.3), ("counting", 0.9)])
def test_a_detection_must_score_above_the_threshold(tag: str, threshold: float) -> None:
    metadata = prompt(tag, {"class": "cup", "count": 1})
    assert not score_detections(cups(1, score=threshold), metadata).correct
    assert score_detections(cups(1, score=threshold + 1e-6), metadata).correct


@pytest.mark.parametrize(
    ("dx", "dy", "relation"), [(-200, 0, "left of"), (200, 0, "right of"), (0, -200, "above"), (0, 200, "below")]
)
def test_relations_are_read_from_the_item_as_seen_from_the_target(dx: float, dy: float, relation: str) -> None:
    cup = Detection("cup", COW.x1 + dx, COW.y1 + dy, COW.x2 + dx, COW.y2 + dy, 0.7)
    for asked in ("left of", "right of", "above", "below"):
        clause = {"class": "cup", "count": 1, "position": [asked, 0]}
        metadata = prompt("position", {"class": "cow", "count": 1}, clause)
        assert score_detections([COW, cup], metadata).correct == (asked == relation)


def test_excluded_objects_break_only_the_leaderboard_rule() -> None:
    metadata = prompt("counting", {"class": "cup", "count": 1}, exclude=[{"class": "dog", "count": 1}])
    result = score_detections([*cups(1), Detection("dog", 0, 0, 9, 9, 0.95)], metadata)
    assert result == GenevalResult(False, True, 1.0, ("expected dog<1, found 1",))


# --- bad input --------------------------------------------------------------------------------------------------------


CUP = {"class": "cup", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": [CUP]}, "tag is None; it must be one of"),
        (prompt("count", CUP), "tag is 'count'"),
        (prompt("counting"), "no include clause"),
        ({"tag": "counting"}, "no include clause"),
        (prompt("counting", {"class": "cup", "count": 0}), r"include\[0\] .* .a whole number from 1"),
        (prompt("counting", {"class": "cup", "count": True}), "a whole number from 1"),
        (prompt("counting", {"count": 1}), r"it needs class \(text\)"),
        (prompt("colors", {**CUP, "colour": "red"}), "no keys but class, color, count, position"),
        (prompt("counting", CUP, exclude=[{**CUP, "color": "red"}]), r"exclude\[0\] .* no keys but class, count"),
        (
            prompt("colors", {**CUP, "color": "Red"}),
            r"include\[0\] .* color is one of red, orange, yellow, green, blue",
        ),
        (prompt("colors", {**CUP, "color": 5}), "color is one of red"),
        (prompt("colors", {**CUP, "color": ["red"]}), "color is one of red"),
        ({"tag": "counting", "include": ["cup"]}, "it must be a mapping"),
        (prompt("position", CUP, {**CUP, "position": ["near", 0]}), r"include\[1\] .* position is \[left of"),
        (prompt("position", CUP, {**CUP, "position": ["above", 1]}), "index of an earlier clause"),
        (prompt("position", CUP, {**CUP, "position": ["above"]}), "index of an earlier clause"),
    ],
)
def test_malformed_metadata_is_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_detections([], metadata)


def test_unknown_quirks_are_named() -> None:
    unknown: Any = "dirty"
    with pytest.raises(ValueError, match="""quirks is 'dirty'; choose "clean" or "reference\""""):
        score_detections([], prompt("counting", CUP), quirks=unknown)
