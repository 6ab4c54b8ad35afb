"""Records of training data, each with its place for messages: fields, names of their own, and what is left out."""

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from tiltflow.data.parts import Parts, Record
from tiltflow.data.sources import open_source
from tiltflow.errors import DataError

OnBad = Literal["error", "skip"]
OverLength = Literal["filter", "truncate", "error"]
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class BadRecord(DataError):
    """A record cannot be used; the message says why and begins with no place."""

    def __init__(self, kind: str, detail: str):
        """Keep a short name to count by, and what exactly is wrong."""
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class LeftOut:
    """Counts what is left out of a data set, or raises at the first."""

    def __init__(self, on_bad: OnBad):
        """Take what a bad record does: `error` or `skip`."""
        self.on_bad = on_bad
        self.counts: Counter[str] = Counter()

    def bad(self, place: str, problem: BadRecord) -> None:
        """Count a bad record.

        Raises:
            DataError: Bad records are errors.
        """
        if self.on_bad == "error":
            raise DataError(
                f"{place}: {problem}; correct it, or leave such records out with "
                "--on_bad_record skip (in a config: on_bad_record: skip)"
            )
        self.counts[problem.kind] += 1


def read_records(source: str, *, names: Sequence[str] = (), columns: Mapping[str, str] | None = None) -> list[Record]:
    """Read all records of a source, in order; lines that are no JSON objects are records with a problem.

    Args:
        source: As for `open_source`.
        names: What records may be read for: those that `columns` can rename.
        columns: Expected name -> the source's own, where they differ; "" for none. A record then has what it calls
            so, and nothing that it has under the expected name itself.

    Raises:
        DataError: There is no such source, it cannot be read, it holds no record or several splits, a package is
            missing, a name is none of `names`, or no record has a column that is named.
    """
    parts = open_source(source)
    check_columns(parts, columns or {}, names)
    records = [record for part in parts.parts for record in part.records()]
    if not columns:
        return records
    return [replace(record, values=_renamed(record.values, columns)) for record in records]


def check_columns(parts: Parts, columns: Mapping[str, str], names: Sequence[str]) -> None:
    """Check that columns which are to be renamed are there, and that their new names are read.

    Raises:
        DataError: One is not.
    """
    for name, own in columns.items():
        if name not in names:
            raise DataError(f"data {parts.name!r}: columns: {name!r} is none of {', '.join(names)}; correct the name")
        if own and not parts.has(own):
            raise DataError(f"data {parts.name!r}: columns: no record has {own!r}, which {name} is to be read from")


def text_field(values: Mapping[str, Any], key: str) -> Any:
    """Return a text or a conversation of a record: a string, or a tuple of messages with `role` and `content`.

    Raises:
        BadRecord: It is missing or something else.
    """
    if key not in values or values[key] is None:
        raise BadRecord("missing key", f"{key!r} is not among {', '.join(sorted(values)) or 'no keys'}")
    value = values[key]
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(_is_message(message) for message in value):
        # Tables fill up messages with null; a call of a tool has no content, which templates ask for.
        return tuple(
            {name: part for name, part in message.items() if part is not None or name == "content"} for message in value
        )
    raise BadRecord("no text", f"{key!r} must be a text, or messages with 'role' and 'content'; it is {short(value)}")


def number_field(values: Mapping[str, Any], key: str, *, low: float, high: float) -> float | None:
    """Return a number of a record, or None if it has none.

    Raises:
        BadRecord: It is no number from `low` to `high`.
    """
    value = values.get(key)
    return None if value is None else checked_number(value, key, low=low, high=high)


def checked_number(value: Any, key: str, *, low: float, high: float) -> float:
    """Return a number.

    Raises:
        BadRecord: It is no number from `low` to `high`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise BadRecord("no number", f"{key} is {short(value)}")
    if not low <= value <= high:
        raise BadRecord(f"{key.partition('[')[0]} out of range", f"{key} is {short(value)}; legal: {low:g} to {high:g}")
    return float(value)


def short(value: Any) -> str:
    """Return a value for a message, however long or deep it is."""
    return _SHORT.repr(value)


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a record under the names that are expected.

    Example: `_renamed({"better": "yes"}, {"chosen": "better"})` is `{"chosen": "yes"}`.
    """
    taken = set(columns.values())
    kept = {name: value for name, value in values.items() if name not in taken and name not in columns}
    return kept | {name: values[own] for name, own in columns.items() if own in values}


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or bool(value.get("tool_calls"))
