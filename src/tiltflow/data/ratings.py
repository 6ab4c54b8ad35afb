"""Texts with ratings of one or several attributes, some of which may be missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltflow.data.preferences import prompted
from tiltflow.data.records import BadRecord, LeftOut, checked_number, read_records, short, text_field

MISSING = -100.0  # the rating that is none


@dataclass(frozen=True)
class Rating:
    """A text, or a conversation, and its ratings.

    Example: `Rating("2 + 2 = 4", (4.0, -100.0), "ratings.jsonl, line 1")`.
    """

    text: Any  # a string, or a tuple of messages
    labels: tuple[float, ...]  # A; MISSING where there is none
    place: str
    named: bool = False  # each was read under its attribute's own name


def read_ratings(
    source: str,
    *,
    left_out: LeftOut,
    attributes: int,
    names: Sequence[str] | None = None,
    label_range: tuple[float, float] | None = None,
    columns: Mapping[str, str] | None = None,
    as_conversation: bool = False,
) -> list[Rating]:
    """Read ratings.

    A record has `text` (a text or a list of messages), or `prompt` and `response`; and `label`, a list of A numbers in
    which -100 or null stands for none, or a number under each attribute's own name.

    Args:
        source: As for `open_source`.
        left_out: Counts records that cannot be used, or raises at the first; one without any rating is none of use.
        attributes: A.
        names: Of the attributes, for records without `label`.
        label_range: The least and the greatest rating.
        columns: Expected name -> the source's own, where they differ.
        as_conversation: Make a conversation of a prompt and a response that are texts; a text without prompt is then a
            bad record.

    Raises:
        DataError: The source cannot be read or is empty, or as `left_out` says.
    """
    ratings = []
    expected = ("text", "prompt", "response", "label", *(names or ()))
    for record in read_records(source, names=expected, columns=columns):
        try:
            if record.problem:
                raise BadRecord("broken JSON", record.problem)
            values = record.values
            labels = _labels(values, attributes, names, label_range or (-1e9, 1e9))
            named = values.get("label") is None
            ratings.append(Rating(_text(values, as_conversation), labels, record.place, named))
        except BadRecord as problem:
            left_out.bad(record.place, problem)
    return ratings


def unrated(ratings: Sequence[Rating], names: Sequence[str]) -> list[str]:
    """Return the attributes that no record has under their name, though records are read by name: misspelt, mostly."""
    if not any(rating.named for rating in ratings):
        return []
    return [name for place, name in enumerate(names) if all(rating.labels[place] == MISSING for rating in ratings)]


def _text(values: Mapping[str, Any], as_conversation: bool) -> Any:
    if "text" in values or "prompt" not in values:
        text = text_field(values, "text")
        if as_conversation and isinstance(text, str):
            raise BadRecord("missing key", "'prompt': a conversation is made of a prompt and a response")
    else:
        text = prompted(values, "response", as_conversation=as_conversation)
    if not text:
        raise BadRecord("empty text", "")
    return text


def _labels(
    values: Mapping[str, Any], attributes: int, names: Sequence[str] | None, label_range: tuple[float, float]
) -> tuple[float, ...]:
    found = values.get("label")
    if found is None:
        if not names or not any(name in values for name in names):
            raise BadRecord("missing key", f"'label' is not among {', '.join(sorted(values))}")
        found = [values.get(name) for name in names]
    elif isinstance(found, int | float):
        found = [found]
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != attributes:
        raise BadRecord(
            "wrong number of ratings", f"label is {short(found)}; num_attributes={attributes} numbers are needed"
        )
    low, high = label_range
    labels = tuple(
        MISSING if each is None or each == MISSING else checked_number(each, f"label[{place}]", low=low, high=high)
        for place, each in enumerate(found)
    )
    if all(label == MISSING for label in labels):
        raise BadRecord("no rating", "all of them are missing")
    return labels
