"""Records of files and tables, of which nothing is read but what is asked for."""

import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, final

from tiltflow.errors import DataError

ABSENT: Final = object()  # stands for a key that a line does not have
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One line of a file or row of a table, or what is wrong with it.

    Example: `Record("pairs.jsonl", 3, {"chosen": "yes", "rejected": "no"})`.
    """

    file: str  # or set
    number: int  # of the line or row, from 1
    values: Mapping[str, Any]
    problem: str = ""
    unit: str = "line"

    @property
    def place(self) -> str:
        """What people look for to find it."""
        return f"{self.file}, {self.unit} {self.number}"


class Part(ABC):
    """The records of one file, or of one set."""

    def __init__(self, name: str, folder: Path, *, unit: str, numbers: Sequence[int]):
        self.name = name
        self.folder = folder  # that paths in it are relative to
        self.unit = unit
        self.numbers = numbers  # from 1; blank lines have one, but are no records
        self.problems: Mapping[int, str] = {}  # index -> why it is no JSON object

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """Return what people look for to find a record."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"

    @property
    @abstractmethod
    def columns(self) -> Sequence[str] | None:
        """Names that every record has; None where each has its own."""

    @abstractmethod
    def column(self, names: Sequence[str]) -> list[Any]:
        """Return what each record has under the first of the names that it has, else ABSENT."""

    @abstractmethod
    def value(self, index: int, names: Sequence[str]) -> Any:
        """Return the same of one record."""

    @abstractmethod
    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Read everything."""

    def records(self) -> Iterator[Record]:
        """Read everything, each record with its place."""
        for index, (number, values) in enumerate(zip(self.numbers, self.rows(), strict=True)):
            yield Record(self.name, number, values, self.problems.get(index, ""), self.unit)


@final
class Lines(Part):
    """A file with a JSON object a line; a line that is none has a problem."""

    def __init__(self, path: Path):
        try:
            content = path.read_bytes().removeprefix(_BOM)
        except OSError as error:
            raise DataError(f"data {path} cannot be read: {error}") from error
        # Only this ends a line: characters such as U+2028 may stand inside a JSON string.
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        super().__init__(str(path), path.parent, unit="line", numbers=[number for number, _ in lines])
        parsed = [_parsed(line) for _, line in lines]
        self._values = [values for values, _ in parsed]
        self.problems = {index: problem for index, (_, problem) in enumerate(parsed) if problem}

    @property
    def columns(self) -> None:
        """Every line has its own."""
        return

    def column(self, names: Sequence[str]) -> list[Any]:
        """Return the values of a key."""
        return [self.value(index, names) for index in range(len(self))]

    def value(self, index: int, names: Sequence[str]) -> Any:
        """Return a value of a line."""
        values = self._values[index]
        return next((values[name] for name in names if name in values), ABSENT)

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Return the objects."""
        return iter(self._values)


@final
class Table(Part):
    """An Arrow table in memory, or in files that are mapped into it."""

    def __init__(self, name: str, folder: Path, table: Any):
        super().__init__(name, folder, unit="row", numbers=range(1, table.num_rows + 1))
        self._table = table
        self._batches = table.to_batches()  # in which a cell is found without a look at all chunks before it
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    @property
    def columns(self) -> Sequence[str]:
        """The columns."""
        return self._table.column_names

    def column(self, names: Sequence[str]) -> list[Any]:
        """Return the values of a column."""
        name = self._own(names)
        return [ABSENT] * len(self) if name is None else self._table.column(name).to_pylist()

    def value(self, index: int, names: Sequence[str]) -> Any:
        """Return a cell."""
        name = self._own(names)
        if name is None:
            return ABSENT
        number = bisect_right(self._ends, index)
        batch = self._batches[number]
        return batch.column(name)[index - self._ends[number] + batch.num_rows].as_py()

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Return the rows."""
        return iter(self._table.to_pylist())

    def _own(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.columns), None)


class Parts:
    """The parts of a source, numbered through."""

    def __init__(self, name: str, parts: Sequence[Part]):
        """Take at least one record.

        Raises:
            DataError: There is none.
        """
        self.name = name
        self.parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self.parts)))
        if not self.parts:
            raise DataError(f"data {name!r} is empty: it holds no record")

    def __len__(self) -> int:
        return self._ends[-1]

    def has(self, name: str) -> bool:
        """Tell whether any record has this key."""
        return any(
            name in part.columns if part.columns is not None else any(v is not ABSENT for v in part.column([name]))
            for part in self.parts
        )

    def find(self, place: int) -> tuple[Part, int]:
        """Return the part in which a record is, and its index there."""
        number = bisect_right(self._ends, place)
        return self.parts[number], place - (self._ends[number - 1] if number else 0)

    def column(self, names: Sequence[str]) -> list[Any]:
        """Return what each record has under the first of the names that it has, else ABSENT."""
        return [value for part in self.parts for value in part.column(names)]


def _parsed(line: bytes) -> tuple[Mapping[str, Any], str]:
    """Return the object of a line, and why it is none or ""."""
    try:
        values = json.loads(line.decode())
        if b"\\ud" in line.lower():  # half of a character, which an escape can write but no tokenizer takes
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits; too deep
        return {}, f"not valid JSON: {error}"
    if not isinstance(values, dict):
        return {}, f"not valid JSON: an object is needed, not {line.decode().strip()[:80]!r}"
    return values, ""
