"""Records of training data from files, folders and the hub, each with its place for messages; nothing vanishes."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tiltflow.errors import DataError

OnBad = Literal["error", "skip"]
SHARDS = (".jsonl", ".parquet", ".arrow")


@dataclass(frozen=True)
class Record:
    """One line of a file or row of a table, or what is wrong with it.

    Example: `Record("pairs.jsonl, line 3", {"chosen": "yes", "rejected": "no"})`.
    """

    place: str
    values: Mapping[str, Any]
    problem: str = ""


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
            raise DataError(f"{place}: {problem}; correct it, or leave such records out: on_bad_record: skip")
        self.counts[problem.kind] += 1


def read_records(source: str) -> list[Record]:
    """Read all records of a source, in order; lines that are no JSON objects are records with a problem.

    Args:
        source: A file (.jsonl, .parquet, .arrow), a folder of such files or one written by `datasets`' save_to_disk, or
            a data set of the hub as `owner/name`, `owner/name@split` or `owner/name:config@split` (split `train`).

    Raises:
        DataError: There is no such source, it cannot be read, it holds no record, or a package is missing.
    """
    path = Path(source)
    if path.is_file():
        records = _read_file(path)
    elif path.is_dir():
        records = _read_folder(path)
    elif path.suffix in SHARDS or source.startswith((".", "/", "~")) or "/" not in source:
        raise DataError(f"data {source!r}: no such file or folder; a data set of the hub is written owner/name@split")
    else:
        records = _read_hub(source)
    if not records:
        raise DataError(f"data {source!r} is empty: it holds no record")
    return records


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
    raise BadRecord("no text", f"{key!r} must be a text, or messages with 'role' and 'content'; it is {_short(value)}")


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
        raise BadRecord("no number", f"{key} is {_short(value)}")
    if not low <= value <= high:
        raise BadRecord(f"{key.partition('[')[0]} out of range", f"{key} is {value:g}; legal: {low:g} to {high:g}")
    return float(value)


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a record under the names that are expected, given which of its own columns has which.

    Example: `renamed({"better": "yes"}, {"chosen": "better"})` is `{"chosen": "yes"}`.
    """
    taken = set(columns.values())
    kept = {name: value for name, value in values.items() if name not in taken and name not in columns}
    return kept | {name: values[own] for name, own in columns.items() if own in values}


def _read_file(path: Path) -> list[Record]:
    match path.suffix:
        case ".jsonl":
            return _read_lines(path)
        case ".parquet" | ".arrow":
            return _numbered(str(path), _table_rows(path))
        case _:
            raise DataError(f"data {path}: ends in {path.suffix!r}; it must be one of {', '.join(SHARDS)}")


def _read_lines(path: Path) -> list[Record]:
    try:
        # Not splitlines(): characters such as U+2028 may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {path} cannot be read: {error}") from error
    return [_from_line(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _from_line(place: str, line: str) -> Record:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return Record(place, {}, f"not valid JSON: {error}")
    if not isinstance(values, dict):
        return Record(place, {}, f"not valid JSON: an object is needed, not {_short(values)}")
    return Record(place, values)


def _read_folder(path: Path) -> list[Record]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        datasets = _datasets()
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            raise DataError(f"data {path} holds splits; give the folder of one: {', '.join(sorted(found))}")
        return _numbered(str(path), found)
    files = sorted(file for file in path.iterdir() if file.suffix in SHARDS)
    if not files:
        raise DataError(f"data {path}: the folder has no file that ends in {', '.join(SHARDS)}")
    return [record for file in files for record in _read_file(file)]


def _read_hub(source: str) -> list[Record]:
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the network, the hub, the files and their schema may all fail
        raise DataError(
            f"data {source!r}: no such file or folder, and no data set of the hub that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _numbered(source, found)


def _table_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"data {path}: needs pyarrow; pip install 'tiltflow[parquet]'") from error
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        with pa.memory_map(str(path)) as file:
            try:
                return pa.ipc.open_file(file).read_all().to_pylist()
            except pa.ArrowInvalid:  # the other of the two forms: `datasets` writes streams
                file.seek(0)
                return pa.ipc.open_stream(file).read_all().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data {path} cannot be read: {error}") from error


def _numbered(source: str, rows: Iterable[Any]) -> list[Record]:
    return [Record(f"{source}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data of the hub and of save_to_disk needs: pip install 'tiltflow[datasets]'") from error
    return datasets


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or bool(value.get("tool_calls"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
