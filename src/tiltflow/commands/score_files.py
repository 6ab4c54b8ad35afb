"""The files of `tiltflow score`: the rows that are there already, and the finished table in three formats."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tiltflow.commands.same_rewards import reward_classes, split_reward
from tiltflow.data.images import ImageFile
from tiltflow.errors import ConfigError, DataError
from tiltflow.rewards import RewardArguments
from tiltflow.runtime.files import write_atomically, write_error

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
    """Rows that are already there, in a JSONL file: its first line says of what, each other one holds a group.

    A group that is there twice counts as it is written last.
    """

    def __init__(self, path: Path, rewards: Sequence[RewardArguments], files: Sequence[ImageFile], *, group_size: int):
        """Describe the scoring that the file must be of.

        Args:
            path: Of the file, there or not.
            rewards: That score.
            files: All images, in order.
            group_size: Images that belong together; rows are kept by whole groups.
        """
        self._path = path
        self._images = [str(file.path) for file in files]
        self._states = [_state(file.path) for file in files]  # before any is read: a later change shows
        self._group_size = group_size
        classes = reward_classes(rewards)
        self._head: dict[str, Any] = {
            "rewards": [split_reward(reward.model_dump(mode="json"), classes)[0] for reward in rewards],
            "number of images": len(files),
            "images": _digest(self._images),
            "prompts": _digest([file.prompt.text for file in files]),
            "metadata": _digest([dict(file.prompt.metadata) for file in files]),
            "group_size": group_size,
        }

    def read(self) -> dict[int, list[Mapping[str, Any]]]:
        """Return the rows of each group that was scored; a half-written last line is dropped.

        A group whose images have changed since, by size or time of modification, is left out.

        Raises:
            DataError: The file is damaged, or of another scoring; says what differs.
        """
        if not self._path.exists():
            return {}
        *complete, cut = self._path.read_bytes().split(b"\n")  # after the last newline: nothing, or half a line
        if not complete:
            self.remove()
            return {}
        try:
            head, *groups = [json.loads(line) for line in complete]
            known = {int(group["group"]): group for group in groups}
            differing = [key for key in self._head if head.get(key) != self._head[key]]
            fit = [[row["image"] for row in each["rows"]] == self._images_of(group) for group, each in known.items()]
            current = [each["states"] == self._states_of(group) for group, each in known.items()]
            rows = [each["rows"] for each in known.values()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{self._path} is damaged ({error!r}); remove it to start afresh") from error
        if differing:
            raise DataError(
                f"{self._path} was begun with other {', '.join(differing)}; give the same again to go on, remove the "
                "file to start afresh, or choose another --output"
            )
        if not all(fit):
            raise DataError(f"{self._path} is damaged (its rows are of other images); remove it to start afresh")
        if cut:
            write_atomically(self._path, b"".join(line + b"\n" for line in complete))
        return {group: each for group, each, same in zip(known, rows, current, strict=True) if same}

    def append(self, groups: Mapping[int, list[Mapping[str, Any]]]) -> Mapping[int, list[Mapping[str, Any]]]:
        """Add the rows of groups to the file and return them.

        Raises:
            CheckpointError: The system refused.
        """
        new = [] if self._path.exists() else [self._head]
        lines = [{"group": group, "states": self._states_of(group), "rows": rows} for group, rows in groups.items()]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in (*new, *lines))
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise write_error(self._path.name, self._path.parent, error) from error
        return groups

    def remove(self) -> None:
        """Remove the file: the rows are in the output now."""
        self._path.unlink(missing_ok=True)

    def _images_of(self, group: int) -> list[str]:
        return self._images[group * self._group_size : (group + 1) * self._group_size]

    def _states_of(self, group: int) -> list[list[int] | None]:
        return self._states[group * self._group_size : (group + 1) * self._group_size]


def _state(path: Path) -> list[int] | None:
    """Return what tells whether a file was written anew: its size in bytes and time in ns; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _digest(values: Sequence[Any]) -> str:
    """Return a short text that is another one for other values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
