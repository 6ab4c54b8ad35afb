"""A rubric that makes a judge rate aspects of an image from 1 to 4, and reading its answer.

The answer is asked for in the form that the published RationalRewards models were trained on: numbered headings, a
justification and a line "Score:" under each, and a summary at the end.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tiltflow.errors import UnparsableError

LOWEST: Final = 1.0
HIGHEST: Final = 4.0
SHOWN: Final = 60  # characters of an answer in a message
LONGEST_HEADING: Final = 80  # characters; a longer line that ends in a colon is prose


@dataclass(frozen=True)
class Aspect:
    """One thing that is rated.

    Example: `Aspect("Text Rendering", "text[ _-]+rendering", "Is ...?", ("...", "...", "...", "..."))`.
    """

    title: str  # its heading
    pattern: str  # regular expression of the heading, as judges vary it
    question: str
    levels: tuple[str, str, str, str]  # what 4, 3, 2 and 1 mean
    optional: bool = False  # may be answered with N/A


ASPECTS: Final[Mapping[str, Aspect]] = {
    "text_faithfulness": Aspect(
        "Text Faithfulness",
        r"text[\s_-]+faithfulness",
        "Does the result show what the instruction asks for?",
        (
            "everything asked for is there, as asked",
            "what matters is there; a detail deviates",
            "something asked for is absent, changed or wrong",
            "it misses or contradicts what matters",
        ),
    ),
    "image_faithfulness": Aspect(
        "Image Faithfulness",
        r"image[\s_-]+faithfulness",
        "Is everything in the source image that was not to be changed still the same?",
        (
            "all that should stay has stayed",
            "small changes that one has to look for",
            "clear changes to things or people that should have stayed",
            "hardly the same picture any more",
        ),
    ),
    "physical_quality": Aspect(
        "Physical and Visual Quality",
        r"physical(?:[\s_-]+(?:and|&)[\s_-]+visual)?[\s_-]+quality",
        "Is it technically sound: anatomy, geometry, light, sharpness, no artifacts?",
        (
            "no flaw can be seen",
            "small flaws that do not disturb",
            "flaws that one sees at once",
            "broken: severe distortions or artifacts",
        ),
    ),
    "text_rendering": Aspect(
        "Text Rendering",
        r"text[\s_-]+rendering",
        "Are the words that should be in the image there, spelt rightly and legible? N/A if none were asked for.",
        (
            "every word is right and legible",
            "small mistakes; all can be read",
            "several words are wrong or hard to read",
            "unreadable, or not there",
        ),
        optional=True,
    ),
}

SYSTEM: Final = (
    "You judge pictures made by image generators: strictly, fairly, and always in the form you are asked for."
)
T2I_TASK: Final = "The picture above was generated from this instruction:"
EDIT_TASK: Final = (
    "The first picture above is the source image. The second is what an editor made of it after this instruction:"
)


def write_rubric(task: str, aspects: Sequence[str]) -> str:
    """Return the question to the judge, with `{prompt}` where the instruction goes.

    Args:
        task: What the pictures before the question are.
        aspects: Names from `ASPECTS`, in the order of the answer.
    """
    guide, form = [], []
    for number, name in enumerate(aspects, start=1):
        aspect = ASPECTS[name]
        guide.append(f"{number}. {aspect.title}: {aspect.question}")
        guide += [f"   {4 - index} = {meaning}" for index, meaning in enumerate(aspect.levels)]
        score = "a number from 1 to 4, or N/A" if aspect.optional else "a number from 1 to 4"
        form += [f"{number}. {aspect.title}:", "## Justification: [what you see]", f"## Score: [{score}]"]
    return "\n".join(
        [
            f"{task}\n\n{{prompt}}\n",
            f"Rate {len(aspects)} aspects from 1 to 4; steps such as 2.5 are allowed.\n",
            *guide,
            "\nAnswer in exactly this form:\n",
            "# User Request Analysis\n[what the instruction asks for]\n# Detailed Judgement",
            *form,
            "# Summary: [one or two sentences]",
        ]
    )


# --- reading the answer ----------------------------------------------------------------------------------------------

_DASH = "\u2013\u2014-"  # the two long ones and the short one
# Markdown and blanks. Two runs of them never stand side by side: trying all ways to part one run could take very long.
_MARKS = r"[\s>#*_`•-]*"
_NUMBER = rf"(?:(?P<number>\d+)\s*[.):]{_MARKS})?"
_ASIDE = r"[\s*_`]*(?:\([^)]*\)[\s*_`]*)?"  # such as " (1-4)**"
_SUMMARY = (
    r"(?:overall[\s_-]+)?(?:summary|conclusion)|overall(?:[\s_-]+(?:assessment|judge?ment|evaluation|verdict|score))?"
)
_NAMES = "|".join(f"(?P<{name}>{aspect.pattern})" for name, aspect in ASPECTS.items())
_HEADING = re.compile(
    rf"{_MARKS}{_NUMBER}(?:{_NAMES}|(?P<summary>{_SUMMARY})){_ASIDE}(?P<rest>$|[:{_DASH}].*)", re.IGNORECASE
)
# Of something else: what follows does not belong to the aspect before.
_OTHER = re.compile(rf"[\s>#*_`•-]{{0,20}}\d+\s*[.)][^:]{{1,{LONGEST_HEADING}}}:[\s*_`]*$")
_SCORE = re.compile(rf"{_MARKS}(?:score|rating){_ASIDE}[:={_DASH}](?P<value>.*)$", re.IGNORECASE)
_NOT_APPLICABLE = re.compile(r"n\s*/\s*a\b|n\.?\s?a\.?(?=\W|$)|not applicable|none\W*$", re.IGNORECASE)
_VALUE = re.compile(r"(?P<score>[+-]?\d+(?:[.,]\d+)?)(?:\s*(?:/|out of|of)\s*(?P<best>\d+(?:[.,]\d+)?))?(?P<after>.*)$")
_NO_SCORE_AFTER = re.compile(
    r"[.,]?\d|[^\W\d_]|[\u00bc-\u00be]"  # more of the number, or letters that hang on to it: "1.2.3", "1e3", "3rd"
    rf"|\s*(?:[~\u00b1\u2192{_DASH}]\s*\d|(?:to|or|and)\s+\d)"  # a range, or a choice
    r"|\s*[%/\d]"  # a percentage, a fraction of a fraction
    r"|.*?\bout of\s+(?!4(?![.,]?\d))\d",  # another scale further on: "3 stars out of 5"
    re.IGNORECASE,
)
_THOUGHTS = ("<think>", "</think>")


@dataclass
class _Section:
    """What stands under one heading."""

    name: str  # of an aspect, "summary", or "other"
    numbered: bool
    rest: str  # of the heading's own line
    lines: list[str] = field(default_factory=list[str])


def read_aspects(answer: str, aspects: Sequence[str]) -> dict[str, float | None]:
    """Return the score of each aspect in [1, 4]; None for one that does not apply, as the answer says (N/A).

    Headings may be bold, of any level, numbered or not, in any order. Of several sections with one heading the first
    with a score counts. What stands under a summary never does, nor what a reasoning model thinks before it answers.
    A number that is none of the scale was not meant on it: it is no score, rather than the nearest one that is.

    Args:
        answer: Of the judge.
        aspects: Names from `ASPECTS`.

    Raises:
        UnparsableError: An aspect is not mentioned, has no score, or one that cannot be read, is not out of 4 or is not
            in [1, 4].
    """
    _, thought, said = answer.rpartition(_THOUGHTS[1])
    if _THOUGHTS[0] in said:
        raise _unparsable(f"it ends in the judge's thoughts: {_short(said.partition(_THOUGHTS[0])[2])}")
    sections = _sections(said if thought else answer)
    return {name: _score(name, _written(name, sections)) for name in aspects}


def _written(name: str, sections: Sequence["_Section"]) -> str:
    """Return what an answer says the score of an aspect is."""
    own = [section for section in sections if section.name == name]
    written = [value for section in own if (value := _written_score(section)) is not None]
    if written:
        return written[0]
    title = ASPECTS[name].title
    if not own:
        raise _unparsable(f"it does not mention {title!r}")
    raise _unparsable(f"it has a section {title!r} without a score: {_short(' '.join([own[0].rest, *own[0].lines]))}")


def _unparsable(why: str) -> UnparsableError:
    return UnparsableError(f"the judge's answer is unparsable: {why}")


def _short(text: str) -> str:
    """Return what was said, for a message: one line, and no more of it than shows what is wrong."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else f"{line[:SHOWN]}...")


def _sections(answer: str) -> list[_Section]:
    sections: list[_Section] = []
    for line in answer.splitlines():
        heading = _HEADING.match(line)
        if heading is None:
            if _OTHER.match(line):
                sections.append(_Section("other", numbered=True, rest=""))
            elif sections:
                sections[-1].lines.append(line)
            continue
        name = next(key for key in (*ASPECTS, "summary") if heading[key])
        sections.append(_Section(name, heading["number"] is not None, heading["rest"].lstrip(f": {_DASH}")))
    return _without_mentions(sections)


def _without_mentions(sections: Sequence[_Section]) -> list[_Section]:
    """Return sections after joining those that only look like one to the section before.

    Where an aspect has a numbered heading, a line that begins with its name but has no number is prose.
    """
    numbered = {section.name for section in sections if section.numbered}
    kept: list[_Section] = []
    for section in sections:
        if section.name in numbered and not section.numbered:
            if kept:
                kept[-1].lines += section.lines
        else:
            kept.append(section)
    return kept


def _written_score(section: _Section) -> str | None:
    """Return what a section says its score is, or None."""
    for index, line in enumerate([section.rest, *section.lines]):
        match = _SCORE.match(line)
        if match is not None:
            return match["value"].strip(" \t*_`") or _next_line(section.lines[index:])
    value = _bare(section.rest)
    number = _VALUE.match(value)
    if _NOT_APPLICABLE.match(value) or (number is not None and not number["after"].strip(" .")):
        return section.rest  # "1. Text Faithfulness: 3", but not "...: 3 cats are missing"
    return None


def _next_line(lines: Sequence[str]) -> str:
    return next((line for line in lines if line.strip()), "")


def _score(name: str, text: str) -> float | None:
    value = _bare(text)
    if _NOT_APPLICABLE.match(value):
        return None
    match = _VALUE.match(value)
    best = "4" if match is None else match["best"] or "4"
    if match is None or _NO_SCORE_AFTER.match(match["after"]) or _number(best) != HIGHEST:
        raise _unparsable(
            f"the score of {ASPECTS[name].title!r} cannot be read: {_short(text)}; legal are a number from 1 to 4, "
            "and N/A"
        )
    score = _number(match["score"])
    if not LOWEST <= score <= HIGHEST:
        raise _unparsable(f"the score of {ASPECTS[name].title!r} is {_short(text)}; legal are 1 to 4, and N/A")
    return score


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def _bare(text: str) -> str:
    """Return a value without markdown and brackets."""
    return re.sub(r"[*_`\[\](){}#>]", "", text).strip()
