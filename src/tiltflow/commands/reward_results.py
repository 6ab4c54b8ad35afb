"""What an evaluation of a reward model came to, what its parts are called, and where it is written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltflow.commands.build import CONFIG_FILE
from tiltflow.config import parse_value
from tiltflow.data.sources import SHARDS
from tiltflow.errors import ConfigError
from tiltflow.runtime.files import make_folder, write_atomically
from tiltflow.runtime.plain import plain

FOLDER = "evaluation"  # in the folder of a run


@dataclass(frozen=True)
class RewardOutcome:
    """What a reward model came to.

    Example: `RewardOutcome("overall  0.8500 ...", {"overall": {...}}, [{"place": ...}], {"ties, left out": 3})`.
    """

    text: str  # the table
    content: Mapping[str, Any]  # of the .json
    rows: Sequence[Mapping[str, Any]]  # of the .jsonl: every pair with its rewards
    notes: Mapping[str, int]  # what was left out or shortened, and how often


def result_path(model: str, data: Sequence[str], output: Path | None) -> Path:
    """Return where a result goes: as asked, else into the run that the model is of, else `outputs/reward_evaluation/`.

    Raises:
        ConfigError: It does not end in .json, or, if nobody asked for it, holds the result of another model or data.
    """
    if output is not None:
        if output.suffix != ".json":
            raise ConfigError(f"--output {output}: the result is JSON; end the name in .json")
        return output
    more = f"-and-{len(data) - 1}-more" if len(data) > 1 else ""
    *names, _ = _names(data[0])
    name = f"{_file_name(names[:2][-1])}{more}.json"
    folder = Path(model)
    run = (
        next((up for up in list(folder.parents)[:2] if (up / CONFIG_FILE).is_file()), None) if folder.exists() else None
    )
    if run is not None:
        path = run / FOLDER / f"{'-'.join(folder.relative_to(run).parts)}-{name}"
    else:
        parts = folder.resolve().parts[-2:] if folder.exists() else (model,)
        path = Path("outputs") / "reward_evaluation" / f"{_file_name('-'.join(parts))}-{name}"
    there = _about(path)
    if there is not None and there != _identity(model, data):
        raise ConfigError(f"{path} holds the result of another model or other data; name another file: --output")
    return path


def write_result(path: Path, outcome: RewardOutcome, *, model: str, data: Sequence[str]) -> None:
    """Write the result, and beside it the rewards of every pair; numbers that are not finite are null."""
    make_folder(path.parent)
    content = {"model": model, "data": list(data), **outcome.content, "notes": dict(outcome.notes)}
    write_atomically(path, json.dumps(plain(content), indent=1, allow_nan=False))
    rows = "".join(f"{json.dumps(plain(row), allow_nan=False)}\n" for row in outcome.rows)
    write_atomically(path.with_suffix(".jsonl"), rows)


def source_names(sources: Sequence[str]) -> list[str]:
    """Return short names of sources, such as `test` for `sets/test.jsonl`; where they are equal, longer ones.

    Args:
        sources: Files, folders, names of the hub, or mappings as text.

    Raises:
        ConfigError: A source is given twice.
    """
    if twice := [source for place, source in enumerate(sources) if source in sources[:place]]:
        raise ConfigError(f"{twice[0]} is given twice; its pairs would count twice")
    names = [_names(source) for source in sources]
    for depth in range(max(map(len, names))):
        chosen = [each[min(depth, len(each) - 1)] for each in names]
        if len(set(chosen)) == len(chosen):
            return chosen
    return list(sources)


def _names(source: str) -> list[str]:
    """Return ever longer names of a source; the last one is the source itself."""
    if source.startswith("{"):
        values = parse_value("data", source)
        if not isinstance(values, Mapping) or not isinstance(values.get("source"), str):
            return ["drawn", source]
        split = values.get("split")
        return [*_names(values["source"] if split is None else f"{values['source']}@{split}"), source]
    path, _, split = source.partition("@")
    parts = [part for part in Path(path).parts if part not in ("/", ".")] or [path]
    last = Path(parts[-1])
    parts[-1] = last.stem if last.suffix in SHARDS else last.name
    longer = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return [*longer, *([f"{longer[-1]}@{split}"] if split else []), source]


def _file_name(text: str) -> str:
    """Return a text with only what file names may have, without the ends."""
    kept = "".join(letter if letter.isalnum() or letter in "._@" else "-" for letter in text)
    return "-".join(filter(None, kept.split("-")))


def _about(path: Path) -> tuple[str, list[str]] | None:
    """Return the model and the data of a result; None if there is none, or it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _identity(str(content["model"]), [str(each) for each in content["data"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(model: str, data: Sequence[str]) -> tuple[str, list[str]]:
    return _resolved(model), [_resolved(each) for each in data]


def _resolved(text: str) -> str:
    return text if text.startswith("{") or not Path(text).exists() else str(Path(text).resolve())
