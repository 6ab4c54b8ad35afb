"""Questions to judges with a place for the generation prompt."""

from string import Formatter
from typing import Annotated, Final

from pydantic import AfterValidator

PLACE: Final = "prompt"


def check_wording(text: str) -> str:
    """Return a question after checking it.

    `{prompt}` stands for the generation prompt; a brace that is to be read as such is doubled, as in Python.

    Raises:
        ValueError: It is empty, has a single brace, or a place for something else.
    """
    if not text.strip():
        raise ValueError("it is empty; write the question to the judge")
    for _, name, spec, conversion in _parts(text):
        if name is not None and (name != PLACE or spec or conversion):
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{{{written}}} stands for nothing; legal is {{{PLACE}}}, and {{{{ }}}} for braces")
    return text


def check_rubric(text: str) -> str:
    """Return a question that must show the generation prompt, after checking it.

    Raises:
        ValueError: As `check_wording`, or it has no `{prompt}`.
    """
    check_wording(text)
    if not asks_for_prompt(text):
        raise ValueError(f"it has no {{{PLACE}}}: the judge would not know what was asked for")
    return text


def asks_for_prompt(wording: str) -> bool:
    """Tell whether a question has a place for the generation prompt."""
    return any(name == PLACE for _, name, _, _ in _parts(wording))


def fill(wording: str, prompt: str) -> str:
    """Return a checked question with the generation prompt in its place; braces in the prompt stay as they are."""
    return "".join(text + (prompt if name == PLACE else "") for text, name, _, _ in _parts(wording))


Wording = Annotated[str, AfterValidator(check_wording)]
Rubric = Annotated[str, AfterValidator(check_rubric)]


def _parts(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ or }}}} for a brace that is none of {{{PLACE}}}") from error
