"""What an evaluation leaves behind: one row per image, the summary of all rows, and the file that holds them."""

import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiltflow.errors import DataError
from tiltflow.evaluation.statistics import Estimate, Floats, estimate_known, estimate_stratified
from tiltflow.rewards.geneval import TAGS
from tiltflow.runtime.files import make_folder, remove, write_atomically, write_error

_TAGGED: Final = frozenset(
    {"tag", "correct", "strict", "partial"}
)  # what a reward tells when it judges as GenEval does


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


def summarise(rows: Sequence[EvaluationRow]) -> dict[str, Estimate]:
    """Return every key's estimate; the prefix of a key is its reward's name in lower case.

    `<reward>` is the mean score and `<reward>_failures` the number of images without one. Where the reward tells
    `tag`, `correct` and `strict`: `<reward>_correct`, `<reward>_strict` (unweighted means over tags), the same of each
    tag with `_<tag>` added, and `<reward>_partial`, the mean score again under GenEval's name for it.
    """
    groups = np.array([row.group for row in rows])
    summary = {key: column.estimate(groups) for key, column in _columns(rows).items()}
    for name in _reward_names(rows):
        failures = sum(row.scores.get(name) is None for row in rows)
        summary[f"{name.lower()}_failures"] = Estimate(float(failures), math.nan, math.nan, len(rows))
    return summary


def paired_difference(before: EvaluationResult, after: EvaluationResult, key: str) -> Estimate:
    """Return after - before of one key of the summary, image by image over the same prompts and samples.

    Raises:
        DataError: The two were not measured on the same prompts and samples, or have no such key.
    """
    first, second = ({(row.group, row.sample): row for row in result.rows} for result in (before, after))
    if [(place, row.prompt) for place, row in sorted(first.items())] != [
        (place, row.prompt) for place, row in sorted(second.items())
    ]:
        raise DataError(
            f"{before.name!r} ({len(before.rows)} images) and {after.name!r} ({len(after.rows)} images) are not of the "
            "same prompts and samples; evaluate both with one config and one prompt file"
        )
    places = sorted(first)
    columns = [_columns([part[place] for place in places]) for part in (first, second)]
    if not all(key in part for part in columns):
        raise DataError(
            f"key {key!r} has no value per image; keys of both: {', '.join(columns[0].keys() & columns[1])}"
        )
    old, new = (part[key] for part in columns)
    # A difference is never a rate, even where it happens to hold only zeros and ones.
    return estimate_known(new.values - old.values, np.array([group for group, _ in places]), new.strata, rate=False)


def compare_table(results: Sequence[EvaluationResult]) -> str:
    """Return a plain text table: one line a key, one column a result, `value [low, high]` in the cells."""
    keys = list(dict.fromkeys(key for result in results for key in result.summary))
    lines = [["", *(result.name for result in results)]]
    for key in keys:
        lines.append([key, *(str(result.summary[key]) if key in result.summary else "-" for result in results)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(results) + 1)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([padded[0].rstrip(), "  ".join("-" * width for width in widths), *map(str.rstrip, padded[1:])])


@dataclass(frozen=True)
class _Column:
    """What one key of the summary is computed from."""

    values: Floats  # [N], NaN: not part of it
    strata: NDArray[Any]  # [N]; all alike for a plain mean

    def estimate(self, groups: NDArray[Any]) -> Estimate:
        return estimate_stratified(self.values, groups, self.strata)


def _columns(rows: Sequence[EvaluationRow]) -> dict[str, _Column]:
    columns: dict[str, _Column] = {}
    plain = np.zeros(len(rows), dtype=np.int64)
    for name in _reward_names(rows):
        prefix = name.lower()
        scores = np.array([_number(row.scores.get(name)) for row in rows])
        columns[prefix] = _Column(scores, plain)
        infos = [row.info.get(name, {}) for row in rows]
        if not any(info.keys() >= _TAGGED for info in infos):
            continue
        tags = np.array([str(info.get("tag", "")) for info in infos])
        partial = np.array([_number(info.get("partial")) for info in infos])
        columns[f"{prefix}_partial"] = _Column(partial, plain)
        for kind in ("correct", "strict"):
            values = np.array([_number(info.get(kind)) for info in infos])
            columns[f"{prefix}_{kind}"] = _Column(values, tags)
            for tag in _ordered_tags(tags[np.isfinite(values)].tolist()):
                columns[f"{prefix}_{kind}_{tag}"] = _Column(np.where(tags == tag, values, math.nan), plain)
    return columns


def _reward_names(rows: Sequence[EvaluationRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _ordered_tags(tags: Iterable[str]) -> list[str]:
    """Return the distinct tags, GenEval's first and in its order."""
    present = sorted(set(tags))
    return [tag for tag in TAGS if tag in present] + [tag for tag in present if tag not in TAGS]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def finite_or_none(value: float) -> float | None:
    """Return the value, or None for NaN and infinities."""
    return value if math.isfinite(value) else None


def _with_nan(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in item.items()}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it; a number that is not finite becomes None, an unknown object its text."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return finite_or_none(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    return str(value)
