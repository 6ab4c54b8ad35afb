"""What an evaluation leaves behind: one row per image, their summary, and the file that holds both."""

import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tiltflow.errors import DataError
from tiltflow.evaluation.statistics import Estimate
from tiltflow.runtime.files import make_folder, remove, write_atomically, write_error
from tiltflow.runtime.plain import plain


@dataclass(frozen=True)
class EvaluationRow:
    """One image and what the rewards said about it."""

    prompt: str
    sample: int  # 0 .. images_per_prompt - 1
    group: int  # index of the prompt in the list given
    scores: Mapping[str, float | None]  # reward -> score; None: the reward failed
    info: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Any])  # reward -> key -> plain value
    image: str | None = None  # PNG, relative to the folder that holds the result


@dataclass(frozen=True)
class EvaluationResult:
    """All rows of one evaluation and their summary."""

    name: str  # such as "before"
    settings: Mapping[str, Any]
    summary: Mapping[str, Estimate]
    rows: Sequence[EvaluationRow]
    pictures: Mapping[str, Image.Image] = field(default_factory=dict[str, Image.Image], repr=False, compare=False)

    def result_lines(self) -> list[str]:
        """Return `RESULT <key>=<value>` lines, six significant digits; `<key>_low` and `_high` too."""
        lines: list[str] = []
        for key, item in self.summary.items():
            lines.append(f"RESULT {key}={item.value:.6g}")
            if math.isfinite(item.low):
                lines += [f"RESULT {key}_low={item.low:.6g}", f"RESULT {key}_high={item.high:.6g}"]
        return lines

    def without_score(self) -> list[str]:
        """Return the names of the rewards that scored no image at all."""
        return [name for name, failed in self._failed().items() if len(failed) == len(self.rows)]

    def failure_lines(self) -> list[str]:
        """Return a line for each reward that failed: its name, on how many images, and the first reason."""
        return [
            f"reward {name!r} failed on {len(failed)} of {len(self.rows)} images; first reason: "
            f"{failed[0].info.get(name, {}).get('failure', 'none was kept')}"
            for name, failed in self._failed().items()
            if failed
        ]

    def _failed(self) -> dict[str, list[EvaluationRow]]:
        """Return the rows without a score of each reward."""
        names = dict.fromkeys(name for row in self.rows for name in row.scores)
        return {name: [row for row in self.rows if row.scores.get(name) is None] for name in names}

    def save(self, directory: Path) -> Path:
        """Write `<directory>/<name>.json` and the pictures in `<directory>/<name>/`; a missing number is null.

        Everything is written beside its place first. An earlier result of the name stays until that is done, then
        goes before the new one comes: a kill on the way leaves none, never new pictures under old scores.

        Raises:
            CheckpointError: The system refused to write; an earlier result is untouched.
        """
        make_folder(directory)
        path, folder, waiting = directory / f"{self.name}.json", directory / self.name, directory / f".{self.name}.tmp"
        content = {
            "name": self.name,
            "settings": self.settings,
            "summary": {key: asdict(item) for key, item in self.summary.items()},
            "rows": [asdict(row) for row in self.rows],
        }
        text = json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            shutil.rmtree(waiting, ignore_errors=True)
            make_folder(waiting)
            for place, picture in self.pictures.items():
                write_png(picture, waiting / Path(place).name)
            write_atomically(waiting / path.name, text)
            remove(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(waiting, folder)
            os.replace(folder / path.name, path)
            if not self.pictures:
                folder.rmdir()
        except OSError as error:
            raise write_error(path.name, directory, error) from error
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
        return path

    @classmethod
    def load(cls, path: Path) -> "EvaluationResult":
        """Read what `save` wrote.

        Raises:
            DataError: The file is missing or is no evaluation result.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            summary = {key: Estimate(**_with_nan(item)) for key, item in content["summary"].items()}
            rows = [EvaluationRow(**row) for row in content["rows"]]
            return cls(content["name"], content["settings"], summary, rows)
        except OSError as error:
            raise DataError(f"evaluation {path} cannot be read: {error.strerror}; run `tiltflow evaluate`") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no evaluation result ({error!r}); remove it and evaluate again") from error


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all, and the folders above it.

    Raises:
        CheckpointError: The system refused to write.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    make_folder(path.parent)
    write_atomically(path, buffer.getvalue())


def _with_nan(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in item.items()}
