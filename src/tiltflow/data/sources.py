"""Where records lie: lines of JSON, Parquet, Arrow, folders of them or saved by `datasets`, and the hub.

A source is opened as parts, one for each file, of which nothing is read but what is asked for.
"""

import glob
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, final

from tiltflow.errors import DataError

SHARDS: Final = (".jsonl", ".parquet", ".arrow")
ABSENT: Final = object()  # stands for a key that a line does not have
_HUB: Final = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+?)(?::(?P<config>[^@/]+))?(?:@(?P<split>[^/]+))?")
_NUMBERED: Final = re.compile(r"(?P<split>.+)-\d+-of-\d+(?:-[0-9a-f]+)?")  # a shard as `datasets` and the hub name it
_SPLITS: Final = frozenset({"train", "validation", "valid", "val", "dev", "test", "eval"})
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

    def __init__(self, name: str, folder: Path, unit: str, numbers: Sequence[int]):
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
        super().__init__(str(path), path.parent, "line", [number for number, _ in lines])
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
        super().__init__(name, folder, "row", range(1, table.num_rows + 1))
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


def open_source(source: str, *, split: str | None = None, mapped: bool = False) -> Parts:
    """Open a source.

    Args:
        source: A file (.jsonl, .parquet, .arrow); a glob pattern; a folder of files of one of these kinds, or one
            written by `datasets`' save_to_disk; or a data set of the hub as `owner/name` or `owner/name:config`. A
            split may follow a folder or a set of the hub: `owner/name@split`.
        split: The same split (default: `train` of the hub's, all of a folder). Of a folder it is a folder in it, or
            the files whose names begin with it, such as `data/train-00000-of-00002.parquet`.
        mapped: Rows may be larger than the memory: Parquet is first converted to Arrow files in the cache of
            `datasets`, which takes its size there once more, and these are mapped.

    Raises:
        DataError: There is no such source, it cannot be read, it holds no record or several splits, or a package is
            missing.
    """
    base, _, named = source.rpartition("@")
    path = Path(source)
    if base and not path.exists() and Path(base).exists():
        return open_source(base, split=_one_split(source, named, split), mapped=mapped)
    if path.is_dir():
        return Parts(source, _open_folder(path, split, mapped))
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(source, recursive=True)))
    found = _HUB.fullmatch(source)
    if files:
        if split is not None:
            raise DataError(
                f"data {source!r}: split={split!r} chooses from a folder or a set of the hub, and this names files; "
                "leave the split out, or name the folder"
            )
        return Parts(source, _open_files(source, [file for file in files if not file.is_dir()], mapped))
    if found is None or path.suffix in SHARDS:
        raise DataError(
            f"data {source!r}: no such file or folder, and nothing that the pattern matches; a data set of the hub is "
            "written owner/name@split"
        )
    if found["split"] is not None:
        split = _one_split(source, found["split"], split)
    return Parts(source, [_from_hub(source, found["name"], found["config"], split or "train")])


def _one_split(source: str, named: str, split: str | None) -> str:
    if split is not None and split != named:
        raise DataError(f"data {source!r}: split={split!r} is another one than the source's @{named}; leave one out")
    return named


def _open_folder(folder: Path, split: str | None, mapped: bool) -> list[Part]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in splits:
            raise _no_split(folder, split, splits)
        folder, split = folder / str(split), None
    if (folder / "state.json").is_file():
        if split is not None:
            raise DataError(f"data {folder}: it was saved without splits; leave split={split!r} out")
        # Not by its files: a cache-*.arrow beside them holds rows once more.
        return [_from_disk(folder)]
    places = [folder, folder / "data"]
    if split is not None:
        inner = next((place / split for place in places if (place / split).is_dir()), None)
        if inner is not None:
            return _open_folder(inner, None, mapped)
    files = next((found for found in map(_shards, places) if found), [])
    splits = sorted({_split_of(file) for file in files} - {""})
    if split is not None:
        files = [file for file in files if _split_of(file) == split or file.stem.startswith(f"{split}-")]
    if not files or (split is None and len(splits) > 1):
        raise _no_split(folder, split, splits or sorted(each.name for each in folder.iterdir() if _shards(each)))
    return _open_files(str(folder), files, mapped)


def _no_split(folder: Path, split: str | None, splits: Sequence[str]) -> DataError:
    if not splits:
        return DataError(f"data {folder}: the folder has no file that ends in {', '.join(SHARDS)}")
    wrong = "" if split is None else f"there is no split {split!r}; "
    return DataError(
        f"data {folder}: {wrong}it holds the splits {', '.join(splits)}; give one, as {folder}@{splits[0]}"
    )


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in SHARDS and file.is_file())


def _split_of(file: Path) -> str:
    """Return the split that a file's name tells, "" if it tells none."""
    numbered = _NUMBERED.fullmatch(file.stem)
    if numbered:
        return numbered["split"]
    head = file.stem.partition("-")[0]
    first, _, rest = head.partition("_")
    return "" if first not in _SPLITS else first if rest.isdigit() else head


def _open_files(source: str, files: Sequence[Path], mapped: bool) -> list[Part]:
    kinds = {file.suffix for file in files}
    if wrong := sorted(kinds - {*SHARDS}):
        raise DataError(f"data {source}: a file ends in {wrong[0]!r}; it must be one of {', '.join(SHARDS)}")
    if len(kinds) > 1:
        raise DataError(f"data {source}: files of the kinds {', '.join(sorted(kinds))} are mixed; name one kind")
    match kinds.pop():
        case ".jsonl":
            return [Lines(file) for file in files]
        case ".arrow":
            return [_from_arrow(file) for file in files]
        case _:
            return _converted(files) if mapped else [_from_parquet(file) for file in files]


def _parsed(line: bytes) -> tuple[Mapping[str, Any], str]:
    """Return the object of a line, and why it is none or ""."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits; too deep
        return {}, f"not valid JSON: {error}"
    if not isinstance(values, dict):
        return {}, f"not valid JSON: an object is needed, not {line.decode().strip()[:80]!r}"
    return values, ""


def _from_arrow(path: Path) -> Part:
    pa = _pyarrow(path)
    try:
        file = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:  # the other of the two forms: `datasets` writes streams
            file.seek(0)
            table = pa.ipc.open_stream(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data {path} cannot be read: {error}") from error
    return Table(str(path), path.parent, table)


def _from_parquet(path: Path) -> Part:
    pa = _pyarrow(path)
    try:
        return Table(str(path), path.parent, pa.parquet.ParquetFile(path).read())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data {path} cannot be read: {error}") from error


def _converted(files: Sequence[Path]) -> list[Part]:
    """Return the tables of Parquet files from the cache of `datasets`."""
    datasets = _datasets()
    metadata = _pyarrow(files[0]).parquet.read_metadata
    try:
        counts = {file: metadata(file).num_rows for file in files}
        filled = [file for file in files if counts[file]]  # the reader fails on a file without rows
        table = _arrow(datasets.Dataset.from_parquet([str(file) for file in filled])) if filled else None
    except Exception as error:  # pyarrow and datasets fail on a damaged file each in its own way
        reason = error.__cause__ or error
        raise DataError(f"data {', '.join(map(str, files[:3]))} cannot be read: {reason}") from error
    starts = accumulate((counts[file] for file in filled), initial=0)
    return [Table(str(f), f.parent, table.slice(s, counts[f])) for f, s in zip(filled, starts, strict=False) if table]


def _from_disk(folder: Path) -> Part:
    datasets = _datasets()
    try:
        return Table(str(folder), folder, _arrow(datasets.load_from_disk(str(folder))))
    except Exception as error:  # as above
        raise DataError(f"data {folder} cannot be read: {error}") from error


def _from_hub(source: str, name: str, config: str | None, split: str) -> Part:
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network, the hub, the files and their schema may all fail
        raise DataError(
            f"data {source!r}: no such file or folder, and no data set of the hub that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Table(source, Path(), _arrow(found))


def _arrow(dataset: Any) -> Any:
    """Return the table of a set of `datasets`, images as they are stored."""
    return dataset.with_format("arrow")[:]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data of the hub, of save_to_disk, and images in Parquet need the package datasets ({error}); install it "
            "with: pip install 'tiltflow[datasets]'"
        ) from error
    return datasets


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"data {path}: needs pyarrow; pip install 'tiltflow[parquet]'") from error
    return pyarrow
