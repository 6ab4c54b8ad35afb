"""Where pairs of images of one prompt are read from: shards in Pick-a-Pic's columns, the hub, or lines of JSON.

Nothing is decoded and no image is read here but those that somebody asks for.
"""

import glob
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.errors import DataError

Stored = bytes | Path | Tensor  # the content of an image file, the file, or pixels: uint8 [H, W, 3]

COLUMNS: Final = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")  # as Pick-a-Pic is published
KEYS: Final = ("image_0", "image_1", "label_0", "label_1", "prompt")  # of a line of JSON
SHARDS: Final = (".arrow", ".parquet", ".jsonl")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


class PairSource(ABC):
    """N pairs as they are stored; a value that is missing or no number is NaN."""

    def __init__(self, name: str, labels: NDArray[np.float64], labelled: NDArray[np.bool_], prompts: Sequence[Any]):
        self.name = name  # of a file or a set
        self.labels = labels  # [N, 2]
        self.labelled = labelled  # [N]; False where the set says that nobody has judged the pair
        self.prompts = prompts  # N; anything but a non-empty string is a bad record
        self.problems: Mapping[int, str] = {}  # place -> what is wrong with a record besides

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, place: int) -> tuple[Stored, Stored]:
        """Return both images of a pair, as stored.

        Raises:
            DataError: There is none.
        """

    @abstractmethod
    def where(self, place: int) -> str:
        """Return what people look for to find a pair, such as the line of a file."""


def open_pairs(source: str, *, split: str | None = None) -> PairSource:
    """Open a set of pairs.

    Args:
        source: A `.jsonl`, `.parquet` or `.arrow` file, a glob pattern, a folder of shards of one of these kinds, or
            the id of a set on the hub.
        split: A folder of shards in `source`, or a split of the set on the hub.

    Raises:
        DataError: There is nothing, it cannot be read, or a column is missing; says which and what to do.
    """
    files = _files(source, split)
    if not files:
        if _HUB_ID.fullmatch(source) and not Path(source).exists():
            return _StoredPairs(source, _from_hub(source, split))
        inside = f" or in its folder {split!r}" if split else ""
        raise DataError(
            f"pairs {source!r}: no {', '.join(SHARDS)} file there{inside}; give a file, a glob pattern, a folder of "
            "shards or the id of a set on the hub (owner/name)"
        )
    kinds = {path.suffix for path in files}
    if len(kinds) > 1:
        raise DataError(f"pairs {source!r}: files of the kinds {', '.join(sorted(kinds))} are mixed; name one kind")
    if kinds == {".jsonl"}:
        return _LinePairs(source, files)
    return _StoredPairs(source, _from_shards(files))


@final
class _StoredPairs(PairSource):
    """Rows of Arrow tables in memory-mapped files."""

    def __init__(self, name: str, rows: Any):
        missing = [column for column in COLUMNS if column not in rows.column_names]
        if missing:
            raise DataError(
                f"pairs {name!r}: no column {', '.join(missing)}; it has {', '.join(rows.column_names)}, and needs "
                f"{', '.join(COLUMNS)}"
            )
        if not len(rows):
            raise DataError(f"pairs {name!r}: the set is empty; give one with at least one pair")
        self._rows = rows.select_columns(["jpg_0", "jpg_1"])
        columns = [np.asarray([_number(value) for value in rows[column]]) for column in ("label_0", "label_1")]
        judged = rows["has_label"] if "has_label" in rows.column_names else [True] * len(rows)
        super().__init__(name, np.stack(columns, axis=1), np.asarray(judged, dtype=np.bool_), list(rows["caption"]))

    def images(self, place: int) -> tuple[Stored, Stored]:
        """Return the encoded images of a row."""
        row = self._rows[place]
        return self._encoded(row["jpg_0"], place), self._encoded(row["jpg_1"], place)

    def where(self, place: int) -> str:
        """Return the row, counted from 0."""
        return f"{self.name}, row {place}"

    def _encoded(self, value: Any, place: int) -> Stored:
        if isinstance(value, Mapping):  # an image column, undecoded
            value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
        if not isinstance(value, bytes | Path):
            raise DataError(
                f"{self.where(place)}: jpg_0 and jpg_1 must hold encoded images; got {type(value).__name__}"
            )
        return value


@final
class _LinePairs(PairSource):
    """Lines of JSON; the paths of images are relative to their file."""

    def __init__(self, name: str, files: Sequence[Path]):
        self._places: list[tuple[Path, int]] = []
        self._images: list[tuple[Path, Path]] = []
        labels: list[tuple[float, float]] = []
        judged: list[bool] = []
        prompts: list[Any] = []
        problems: dict[int, str] = {}
        for path in files:
            for number, line in _lines(path):
                record, problem = _record(line)
                if problem:
                    problems[len(labels)] = problem
                self._places.append((path, number))
                self._images.append((path.parent / record["image_0"], path.parent / record["image_1"]))
                labels.append((_number(record["label_0"]), _number(record["label_1"])))
                judged.append(record.get("has_label", True) is not False)
                prompts.append(record["prompt"])
        if not labels:
            raise DataError(f"pairs {name!r}: no line in {', '.join(map(str, files))}; write at least one pair")
        super().__init__(name, np.asarray(labels), np.asarray(judged, dtype=np.bool_), prompts)
        self.problems = problems

    def images(self, place: int) -> tuple[Stored, Stored]:
        """Return the files of a line."""
        return self._images[place]

    def where(self, place: int) -> str:
        """Return the file and the line, counted from 1."""
        path, number = self._places[place]
        return f"{path}, line {number}"


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"pairs {path} cannot be read: {error}") from error
    # Not splitlines(): characters such as U+2028 may stand inside a JSON string.
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _record(line: str) -> tuple[dict[str, Any], str]:
    """Return a line's object with all keys, and what is wrong with it or ""."""
    empty: dict[str, Any] = {"image_0": "", "image_1": "", "label_0": None, "label_1": None, "prompt": ""}
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return empty, f"not valid JSON: {error}"
    if not isinstance(record, dict):
        return empty, f"needs an object; got {line.strip()[:80]!r}"
    if "prompt" not in record and "caption" in record:
        record["prompt"] = record["caption"]
    missing = [key for key in KEYS if key not in record]
    if missing:
        return empty | record | _texts(record), f"has no {', '.join(missing)}; it needs {', '.join(KEYS)}"
    named = _texts(record)
    wrong = next((key for key, value in named.items() if not value), None)
    problem = f"{wrong}={record[wrong]!r} must be the path of an image, relative to the file" if wrong else ""
    return record | named, problem


def _texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return both paths, "" for one that is none."""
    values = {key: record.get(key) for key in ("image_0", "image_1")}
    return {key: value if isinstance(value, str) else "" for key, value in values.items()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _files(source: str, split: str | None) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path] if path.suffix in SHARDS else []
    if path.is_dir():
        found = [*(path / split if split else path).glob("*")]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True)]
    return sorted(file for file in found if file.suffix in SHARDS and file.is_file())


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Arrow, Parquet and hub data need the package datasets, which is not installed ({error}); install it "
            "with: pip install 'tiltflow[datasets]', or write the pairs as .jsonl"
        ) from error
    return datasets


def _from_shards(files: Sequence[Path]) -> Any:
    datasets = _datasets()
    names = [str(file) for file in files]
    try:
        if files[0].suffix == ".parquet":
            filled = [name for name in names if _rows_of_parquet(name)]  # the reader fails on a file without rows
            rows = datasets.Dataset.from_parquet(filled) if filled else None
        else:
            rows = datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
    except Exception as error:  # pyarrow and datasets fail on a damaged file each in its own way
        reason = error.__cause__ or error
        raise DataError(f"pairs {', '.join(names[:3])} cannot be read: {reason}") from error
    if rows is None:
        raise DataError(f"pairs {', '.join(names[:3])}: the set is empty; give one with at least one pair")
    return _undecoded(datasets, rows)


def _rows_of_parquet(name: str) -> int:
    parquet: Any = import_module("pyarrow.parquet")  # comes with datasets
    return parquet.read_metadata(name).num_rows


def _from_hub(name: str, split: str | None) -> Any:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # no network, no such set, no such split: each in its own way
        raise DataError(f"pairs {name!r}: no such file, and the hub does not give such a set: {error}") from error
    return _undecoded(datasets, rows)


def _undecoded(datasets: Any, rows: Any) -> Any:
    """Return the rows with image columns left as encoded bytes."""
    for column in ("jpg_0", "jpg_1"):
        if column in rows.column_names and isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows
