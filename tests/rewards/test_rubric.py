"""Reading what judges write along a rubric: the published form, its variations, and what is no score."""

import time

import pytest

from tiltflow.errors import UnparsableError
from tiltflow.rewards.rubric import ASPECTS, EDIT_TASK, T2I_TASK, read_aspects, write_rubric
from tiltflow.rewards.wording import check_rubric, fill

T2I = ("text_faithfulness", "physical_quality", "text_rendering")
EDIT = ("text_faithfulness", "image_faithfulness", "physical_quality", "text_rendering")

PUBLISHED = """# User Request Analysis
The user wants a red fox beside a sign. Text rendering matters: the sign must say "OPEN".
# Detailed Judgement
1. Text Faithfulness:
## Justification: There is a fox, but the physical quality of the sign distracts. Score: that is for below.
## Score: 3.5
2. Physical and Visual Quality:
## Justification: Text faithfulness aside, one paw is fused.
## Score: 2
3. Text Rendering:
## Justification: It reads "OPNE".
## Score: 1.5
# Summary: A decent fox. Score: 4
1. Text Faithfulness:
## Score: 1
"""


def scores(text: str, aspects: tuple[str, ...] = T2I) -> list[float | None]:
    return list(read_aspects(text, aspects).values())


def section(body: str, heading: str = "1. Text Faithfulness:") -> str:
    return f"{heading}\n{body}\n"


def first(text: str) -> float | None:
    return read_aspects(text, T2I[:1])["text_faithfulness"]


def test_the_published_form() -> None:
    assert read_aspects(PUBLISHED, T2I) == {"text_faithfulness": 3.5, "physical_quality": 2.0, "text_rendering": 1.5}


def test_only_what_is_asked_for() -> None:
    assert read_aspects(PUBLISHED, ("physical_quality",)) == {"physical_quality": 2.0}


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ("## Score: 3", 3.0),
        ("Score: 3.5", 3.5),
        ("Score:2", 2.0),
        ("Score: 3/4", 3.0),
        ("Score: 3.5 / 4.0", 3.5),
        ("Score: 3 out of 4", 3.0),
        ("Score: 3 of 4 points", 3.0),
        ("**Score:** 3", 3.0),
        ("**Score**: 3", 3.0),
        ("**Score: 3**", 3.0),
        ("Score: **3**", 3.0),
        ("- **Score (1-4):** `3`", 3.0),
        ("### score = [3]", 3.0),
        ("Score: (3)", 3.0),
        ("SCORE: 3.", 3.0),
        ("Score: 3 (minor flaws)", 3.0),
        ("Score: 3 - minor flaws", 3.0),
        ("Score: 3, because one of 2 cats is missing", 3.0),
        ("Score: 3,5", 3.5),
        ("Rating: 2", 2.0),
        ("> Score: 2", 2.0),
        ("Score:\n2.5", 2.5),
        ("## Score:\n\n**2.5**", 2.5),
        ("Score: 1", 1.0),
        ("Score: 4", 4.0),
        ("Score: +2", 2.0),
        ("Score: 4.0/4.0", 4.0),
        ("Score: 3 stars out of 4", 3.0),
        ("Score: 3; better than most.", 3.0),
        ("Score: 2.", 2.0),
        ("Score: N/A", None),
        ("Score: n/a (no text was asked for)", None),
        ("**Score:** *N/A*", None),
        ("Score: [N/A]", None),
        ("Score: NA", None),
        ("Score: N / A", None),
        ("Score: N/A, as the 3 signs were not asked for", None),
        ("Score: N.A.", None),
        ("Score: Not applicable", None),
        ("Score: None", None),
    ],
)
def test_one_score(line: str, score: float | None) -> None:
    assert first(section(f"## Justification: well\n{line}")) == score


@pytest.mark.parametrize(
    "line",
    [
        "Score: three",
        "Score: see above",
        "Score: 8/10",
        "Score: 80%",
        "Score: 1-4",
        "Score: 2 \u2013 3",
        "Score: 2 to 3",
        "Score: [a number from 1 to 4]",
        "Score:",
        "Score: nothing",
        "Score: None of it can be read",
        "Score: 3/4/5",
        "Score: 1.2.3",
        "Score: 1e3",
        "Score: 3rd",
        "Score: 3\u00bd",
        "Score: 2 ~ 3",
        "Score: 3 \u00b1 1",
        "Score: 3 \u2192 2",
        "Score: 3 or 4",
        "Score: 2 and 3",
        "Score: 3 stars out of 5",
        "Score: 3 stars (out of 10)",
        "Score: 3 stars out of 4.5",
        "Score: NaN",
        "Score: inf",
        "Score: -",
        "Score: null",
    ],
)
def test_what_is_no_score_is_an_error(line: str) -> None:
    unread = "the judge's answer is unparsable: the score of 'Text Faithfulness' cannot be read: "
    with pytest.raises(UnparsableError, match=unread):
        first(section(line))


@pytest.mark.parametrize("said", ["0", "0.9", "0/4", "-1", "4.5", "7", "85", "4.01 / 4"])
def test_a_number_outside_the_scale_is_never_the_nearest_one_on_it(said: str) -> None:
    with pytest.raises(UnparsableError) as caught:
        first(section(f"## Justification: well\n## Score: {said}"))
    assert str(caught.value) == (
        f"the judge's answer is unparsable: the score of 'Text Faithfulness' is '{said}'; legal are 1 to 4, and N/A"
    )


@pytest.mark.parametrize(
    "heading",
    [
        "1. Text Faithfulness",
        "1. Text Faithfulness:",
        "1) text faithfulness",
        "1 . Text Faithfulness -",
        "**1. Text Faithfulness**",
        "**1. Text Faithfulness:**",
        "1. **Text Faithfulness:** it fits well",
        "### 1. Text Faithfulness (How accurate is it?)",
        "## Text Faithfulness",
        "**Text Faithfulness**",
        "- Text Faithfulness:",
        "Text-Faithfulness:",
        "text_faithfulness:",
        "Text Faithfulness",
        "3. TEXT FAITHFULNESS — the instruction",
    ],
)
def test_headings(heading: str) -> None:
    text = section("## Justification: ...\n## Score: 2.5", heading) + section("Score: 4", "2. Physical Quality:")
    assert scores(text, T2I[:2]) == [2.5, 4.0]


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ("1. Text Faithfulness: 3", 3.0),
        ("1. Text Faithfulness: 3.5/4", 3.5),
        ("**Text Faithfulness**: **3**", 3.0),
        ("1. Text Faithfulness — Score: 3/4", 3.0),
        ("1. Text Faithfulness (Score: 2): fine\nScore: 3", 3.0),
        ("1. Text Faithfulness: N/A", None),
        ("1. Text Faithfulness: **N/A** (nothing was asked for)", None),
        ("1. Text Faithfulness: N/A at first sight\nScore: 2", 2.0),
        ("1. Text Faithfulness: 3 foxes are missing\nScore: 2", 2.0),
    ],
)
def test_a_score_beside_its_heading(line: str, score: float | None) -> None:
    assert first(f"{line}\n") == score


def test_a_number_in_prose_is_no_score() -> None:
    with pytest.raises(UnparsableError, match="it has a section 'Text Faithfulness' without a score"):
        first("1. Text Faithfulness: 3 foxes are missing\n")


@pytest.mark.parametrize(
    "title", ["Physical and Visual Quality", "Physical & Visual Quality", "Physical Quality", "physical_quality"]
)
def test_titles_of_physical_quality(title: str) -> None:
    assert scores(section("Score: 3", f"2. {title}:"), ("physical_quality",)) == [3.0]


def test_sections_in_another_order() -> None:
    text = (
        section("Score: 1", "3. Text Rendering:")
        + section("Score: 2", "1. Text Faithfulness:")
        + section("Score: 3", "2. Physical Quality:")
    )
    assert read_aspects(text, T2I) == {"text_faithfulness": 2.0, "physical_quality": 3.0, "text_rendering": 1.0}


@pytest.mark.parametrize("name", T2I)
def test_an_aspect_that_is_not_mentioned_is_an_error_and_its_neighbours_keep_their_own_scores(name: str) -> None:
    title = ASPECTS[name].title
    without = "\n".join(line for line in PUBLISHED.splitlines() if not line.endswith(f". {title}:"))
    others = tuple(other for other in T2I if other != name)
    assert read_aspects(without, others) == {other: read_aspects(PUBLISHED, T2I)[other] for other in others}
    with pytest.raises(UnparsableError, match=f"the judge's answer is unparsable: it does not mention '{title}'$"):
        read_aspects(without, T2I)


def test_a_section_without_a_score_is_an_error_even_when_the_next_has_one() -> None:
    text = section("## Justification: fine") + section("Score: 4", "2. Physical Quality:")
    with pytest.raises(UnparsableError, match="it has a section 'Text Faithfulness' without a score"):
        scores(text)


def test_an_aspect_that_was_not_asked_for_ends_the_section_before() -> None:
    text = section("## Justification: fine") + section("Score: 4", "2. Image Faithfulness:")
    with pytest.raises(UnparsableError, match="it has a section 'Text Faithfulness' without a score"):
        scores(text)
    assert read_aspects(section("Score: 2") + section("Score: 4", "2. Image Faithfulness:"), EDIT[:2]) == {
        "text_faithfulness": 2.0,
        "image_faithfulness": 4.0,
    }


@pytest.mark.parametrize("heading", ["2. Visual Appeal:", "**2. Composition (1-4):**", "### 2) Style & Mood:"])
def test_a_score_under_another_heading_is_not_that_of_the_aspect_before(heading: str) -> None:
    with pytest.raises(UnparsableError, match="it has a section 'Text Faithfulness' without a score: 'fine'"):
        first(f"1. Text Faithfulness:\nfine\n{heading}\nScore: 4\n")
    assert first(f"{heading}\nScore: 4\n1. Text Faithfulness:\n1. a fox\n2. a sign: there\nScore: 2\n") == 2.0


@pytest.mark.parametrize(
    "summary", ["# Summary:", "**Summary**", "Summary: good.", "5. Overall Summary", "Overall score:", "## Conclusion"]
)
def test_a_summary_never_counts_wherever_it_stands(summary: str) -> None:
    rating = section("Score: 2")
    assert first(f"{rating}{summary}\nScore: 4\n") == 2.0
    assert first(f"{summary}\nScore: 4\n{rating}") == 2.0
    with pytest.raises(UnparsableError, match="without a score"):
        first(f"1. Text Faithfulness:\nfine\n{summary}\nScore: 4\n")


def test_a_list_of_the_aspects_before_the_sections() -> None:
    text = "I will rate:\n1. Text Faithfulness\n2. Physical and Visual Quality\n3. Text Rendering\n\n" + PUBLISHED
    assert scores(text) == [3.5, 2.0, 1.5]


def test_prose_with_the_names_of_aspects() -> None:
    text = (
        section("Text rendering: there is none to speak of.\nPhysical quality is another matter.\nScore: 3")
        + section("Physical Quality\nText Faithfulness: see 1.\nScore: 2", "2. Physical Quality:")
        + section("Score: N/A", "3. Text Rendering:")
    )
    assert scores(text) == [3.0, 2.0, None]


def test_the_thinking_of_a_reasoning_model() -> None:
    text = "<think>1. Text Faithfulness:\nScore: 1 or so</think>\n" + section("Score: 3")
    assert first(text) == 3.0


@pytest.mark.parametrize("before", ["", "I think.</think>\n", "<think>one</think>\n"])
def test_thoughts_without_an_end_are_no_answer(before: str) -> None:
    with pytest.raises(UnparsableError, match=r"it ends in the judge's thoughts: '1. Text Faithfulness: Score: 4'"):
        first(f"{before}<think>\n{section('Score: 4')}")


def test_line_ends_of_other_systems() -> None:
    assert scores(PUBLISHED.replace("\n", "\r\n")) == [3.5, 2.0, 1.5]


@pytest.mark.parametrize("text", ["", "The picture is fine.", "Score: 3", "I cannot help with that.", "N/A"])
def test_an_answer_without_sections_is_an_error(text: str) -> None:
    with pytest.raises(UnparsableError, match="it does not mention 'Text Faithfulness'"):
        scores(text)


def test_long_runs_of_marks_take_no_time() -> None:
    began = time.monotonic()
    for mark in ("*", " ", "#", "- ", "_", "1. ", "1"):
        with pytest.raises(UnparsableError):
            scores(f"{mark * 20_000}\n1. Text Faithfulness{mark * 20_000}x\nScore: 3\nScore{mark * 20_000}")
        with pytest.raises(UnparsableError):
            scores(f"1. Text Faithfulness:\nScore: 3{' ' * 20_000}{mark * 20_000} out of {mark * 20_000}5")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("task", "aspects"), [(T2I_TASK, T2I), (EDIT_TASK, EDIT)])
def test_the_rubric_asks_for_the_form_that_is_read(task: str, aspects: tuple[str, ...]) -> None:
    rubric = check_rubric(write_rubric(task, aspects))
    asked = fill(rubric, "a {fox}")
    assert "\na {fox}\n" in asked
    assert [asked.count(f"\n{number}. {ASPECTS[name].title}:") for number, name in enumerate(aspects, 1)] == [2] * len(
        aspects
    )
    form = asked.partition("Answer in exactly this form:")[2]
    answer = form.replace("[a number from 1 to 4]", "2.5").replace("[a number from 1 to 4, or N/A]", "N/A")
    assert scores(answer, aspects) == [*[2.5] * (len(aspects) - 1), None]


def test_only_text_rendering_may_be_left_out() -> None:
    assert [name for name, aspect in ASPECTS.items() if aspect.optional] == ["text_rendering"]
