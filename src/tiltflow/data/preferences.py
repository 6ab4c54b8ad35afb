"""Pairs of texts of which people preferred one: two in a record, or two lines after each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from tiltflow.data.parts import Record
from tiltflow.data.records import BadRecord, LeftOut, number_field, read_records, text_field

Layout = Literal["auto", "pairs", "adjacent"]
AsConversation = bool | Literal["prompted"]
MARGINS = (-1e6, 1e6)  # what a margin may be
NAMES = ("prompt", "chosen", "rejected", "margin", "label", "subset", "text")


@dataclass(frozen=True)
class Preference:
    """Two texts, or two conversations, and how surely which of them is the better.

    Example: `Preference("2 + 2 = 4", "2 + 2 = 5", place="pairs.jsonl, line 1")`.
    """

    chosen: Any  # a string, or a tuple of messages
    rejected: Any  # the same kind
    place: str
    margin: float | None = None  # by how much the chosen one is better
    label: float = 1.0  # probability that the chosen one is the better; 0.5 is a tie
    subset: str = ""


def read_preferences(
    source: str,
    *,
    left_out: LeftOut,
    layout: Layout = "auto",
    columns: Mapping[str, str] | None = None,
    as_conversation: AsConversation = False,
) -> list[Preference]:
    """Read preferences.

    A record of layout `pairs` has `chosen` and `rejected`, each a text or a list of messages, and maybe `prompt` of the
    same kind, which is put before both unless messages begin with it already; `margin`; `label`; and `subset`. A record
    of layout `adjacent` has `text`, and two after each other in a file, the first and second, the third and fourth, are
    a chosen and a rejected one. Neither a blank line nor the end of a file stands between them: behind an odd number of
    lines that nothing divides nobody knows which belong together, and no more pairs are made.

    Args:
        source: As for `open_source`.
        left_out: Counts records that cannot be used, or raises at the first. Of two adjacent lines both are left out.
        layout: `auto` takes `adjacent` if the first record has `text` and no `chosen`.
        columns: Expected name -> the source's own, where they differ.
        as_conversation: Make a conversation of a prompt and an answer that are texts: a user's and an assistant's
            message. A text without prompt is then a bad record, unless `prompted` takes it as it is.

    Raises:
        DataError: The source cannot be read or is empty, or as `left_out` says.
    """
    records = read_records(source, names=NAMES, columns=columns)
    if layout == "auto":
        first = next((record.values for record in records if not record.problem), {})
        layout = "adjacent" if "text" in first and "chosen" not in first else "pairs"
    if layout == "adjacent":
        return list(_adjacent(records, left_out))
    return list(_pairs(records, left_out, as_conversation))


def _pairs(records: Sequence[Record], left_out: LeftOut, as_conversation: AsConversation) -> Iterator[Preference]:
    for record in records:
        try:
            if record.problem:
                raise BadRecord("broken JSON", record.problem)
            yield _checked(_from_pair(record, as_conversation))
        except BadRecord as problem:
            left_out.bad(record.place, problem)


def _from_pair(record: Record, as_conversation: AsConversation) -> Preference:
    values = record.values
    chosen, rejected = (prompted(values, key, as_conversation=as_conversation) for key in ("chosen", "rejected"))
    low, high = MARGINS
    label = number_field(values, "label", low=0.0, high=1.0)
    return Preference(
        chosen,
        rejected,
        record.place,
        margin=number_field(values, "margin", low=low, high=high),
        label=1.0 if label is None else label,
        subset=str(values.get("subset") or ""),
    )


def prompted(values: Mapping[str, Any], key: str, *, as_conversation: AsConversation) -> Any:
    """Return an answer of a record, its prompt before it if it has one; the arguments are those of `read_preferences`.

    Raises:
        BadRecord: It has no answer, or prompt and answer cannot be put together.
    """
    answer = text_field(values, key)
    if values.get("prompt") is not None:
        return _after(text_field(values, "prompt"), answer, bool(as_conversation))
    if as_conversation is True and isinstance(answer, str):
        raise BadRecord("missing key", "'prompt': a conversation is made of a prompt and an answer")
    return answer


def _after(prompt: Any, answer: Any, as_conversation: bool) -> Any:
    """Return prompt and answer as one text or one conversation; messages that hold the prompt already stay as they are.

    Raises:
        BadRecord: They cannot be put together.
    """
    if not isinstance(answer, str) and _begins_with(answer, prompt):
        return answer
    if isinstance(prompt, str) and not isinstance(answer, str) and answer[0]["role"] != "assistant":
        raise BadRecord(
            "mixed kinds",
            f"prompt is a text, and the messages begin with another turn of the {answer[0]['role']}; where they hold "
            "the whole conversation, leave the prompt out: columns: {prompt: ''}",
        )
    if as_conversation:
        start = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        return start + (({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer)
    if isinstance(prompt, str) != isinstance(answer, str):
        raise BadRecord(
            "mixed kinds",
            "prompt and answers must all be texts or all be messages; as_conversation: true makes messages",
        )
    return prompt + answer


def _begins_with(answer: tuple[Any, ...], prompt: Any) -> bool:
    """Tell whether messages begin with the prompt, maybe after a system message: many published sets hold it twice."""
    if not isinstance(prompt, str):
        return answer[: len(prompt)] == prompt
    first = answer[1:2] if answer[0]["role"] == "system" else answer[:1]
    return any(each["role"] == "user" and each.get("content") == prompt for each in first)


def _adjacent(records: Sequence[Record], left_out: LeftOut) -> Iterator[Preference]:
    for pair in _partners(records):
        place = pair[0].place
        try:
            texts = []
            for record in pair:
                place = record.place
                if record.problem:
                    raise BadRecord("broken JSON", record.problem)
                texts.append(text_field(record.values, "text"))
            if len(pair) < 2:
                raise BadRecord(
                    "no partner",
                    "a chosen line and the rejected one must follow each other in one file; behind an odd number of "
                    "lines nobody knows which belong together",
                )
            chosen, rejected = texts
            yield _checked(Preference(chosen, rejected, pair[0].place))
        except BadRecord as problem:
            left_out.bad(place, problem)


def _partners(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Yield two adjacent lines at a time, and one at a time where nobody knows which belong together."""
    known = True
    # Within a run, lines follow each other in one file, without a blank one between them.
    for _, numbered in groupby(enumerate(records), key=lambda each: (each[1].file, each[1].number - each[0])):
        run = [record for _, record in numbered]
        even = len(run) % 2 == 0
        # Of an odd number the last is alone if nothing is before them; after a gap it may as well be the first. What
        # comes behind may begin with the rejected line of a chosen one that was left alone.
        size = 2 if known and (even or (run[0] is records[0] and run[0].number == 1)) else 1
        known &= even
        yield from (run[first : first + size] for first in range(0, len(run), size))


def _checked(preference: Preference) -> Preference:
    chosen, rejected = preference.chosen, preference.rejected
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("mixed kinds", "chosen and rejected must both be texts or both be messages")
    if not chosen or not rejected:
        raise BadRecord("empty text", "chosen" if not chosen else "rejected")
    if chosen == rejected:
        raise BadRecord("identical chosen and rejected", "nothing can be learnt from it")
    return preference
