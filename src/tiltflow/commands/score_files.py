"""The files of `tiltflow score`: the rows that are there already, and the finished table in three formats."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tiltflow.data.images import ImageFile
from tiltflow.errors import ConfigError, DataError
from tiltflow.rewards import RewardArguments
from tiltflow.runtime.files import write_atomically

FORMATS = (".jsonl", ".csv", ".parquet")


def check_output(output: Path) -> None:
    """Check that a file can be written in the format of its ending.

    Raises:
        ConfigError: There is no such format, or its package is not installed.
    """
    if output.suffix not in FORMATS:
        raise ConfigError(f"--output {output}: ends in {output.suffix!r}; write {', '.join(FORMATS)}")
    if output.suffix == ".parquet":
        _parquet()


class PartFile:
    """Rows that are already there, in a JSONL file whose first line says of what."""

    def __init__(self, path: Path, rewards: Sequence[RewardArguments], files: Sequence[ImageFile]):
        self._path = path
        self._images = [str(file.path) for file in files]
        self._head = {"rewards": [reward.model_dump(mode="json") for reward in rewards], "images": len(files)}

    def read(self) -> list[Mapping[str, Any]]:
        """Return the rows of an interrupted scoring; a half-written last line is dropped."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")
        complete = lines[:-1]  # the last one has no newline: it is empty, or was cut
        try:
            head, *rows = [json.loads(line) for line in complete]
        except ValueError as error:
            raise DataError(f"{self._path} is damaged ({error}); remove it to start afresh") from error
        done = [row["image"] for row in rows]
        if head != self._head or done != self._images[: len(done)]:
            raise DataError(f"{self._path} is of other images or rewards; remove it, or choose another --output")
        if lines[-1]:
            write_atomically(self._path, "".join(f"{line}\n" for line in complete))
        return rows

    def append(self, rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Add rows to the file and return them."""
        new = [] if self._path.exists() else [self._head]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in (*new, *rows)))
        return rows

    def remove(self) -> None:
        """Remove the file: the rows are in the output now."""
        self._path.unlink(missing_ok=True)


def write_rows(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows in the format of the file's ending.

    Raises:
        CheckpointError: The system refused.
    """
    if output.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_atomically(output, text)
        return
    flat = [_flat(row) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    buffer = io.BytesIO()
    if output.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, keys, restval="")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in flat)
        buffer.write(text.getvalue().encode())
    else:
        arrow, parquet = _parquet()
        columns = {key: _column(arrow, [row.get(key) for row in flat]) for key in keys}
        parquet.write_table(arrow.table(columns), buffer)
    write_atomically(output, buffer.getvalue())


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as columns: `image`, `prompt`, a column per reward, `<reward>.<key>` and `<reward>.failure`."""
    info = {f"{name}.{key}": value for name, cells in row["info"].items() for key, value in cells.items()}
    failed = {f"{name}.failure": text for name, text in row["failures"].items()}
    return {"image": row["image"], "prompt": row["prompt"], **row["scores"], **info, **failed}


def _cell(value: Any) -> Any:
    """Return a value for a cell of text: a list joined with "; ", a mapping as JSON."""
    if isinstance(value, list):
        return "; ".join(str(_cell(item)) for item in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _column(arrow: Any, values: Sequence[Any]) -> Any:
    """Return values as a Parquet column: numbers, texts or lists of one kind as they are, a mixture as text."""
    if not any(isinstance(value, dict) for value in values):  # Parquet knows no mapping without keys
        try:
            return arrow.array(values)
        except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError):  # what a reward tells may be of any kind
            pass
    return arrow.array([None if value is None else str(_cell(value)) for value in values])


def _parquet() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"a .parquet output needs the package pyarrow, which is not installed ({error}); install it with: "
            "pip install 'tiltflow[parquet]', or write .jsonl or .csv"
        ) from error
