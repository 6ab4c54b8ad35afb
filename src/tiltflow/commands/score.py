"""`tiltflow score`: image files, their prompts and rewards; a table on the screen and a row per image on the disk."""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tiltflow.commands.score_files import PartFile, check_output, write_rows
from tiltflow.config import check_group_size, groupwise_names, normalise_rewards, parse_value, validate
from tiltflow.data.images import ImageFile, find_images
from tiltflow.errors import ConfigError, DataError, RewardError
from tiltflow.rewards import (
    RewardArguments,
    RewardEngine,
    build_reward_model,
    check_prompts,
    check_reward,
    reward_class,
    sealed_reward,
)
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.files import make_folder
from tiltflow.runtime.plain import finite_or_none, plain
from tiltflow.runtime.tables import aligned
from tiltflow.types import RewardTable

CHUNK = 64  # images in memory, and rows between two writes


def run_scoring(
    *, images: str, rewards: Sequence[str], prompts: str | None, output: Path, batch_size: int, group_size: int
) -> list[Mapping[str, Any]]:
    """Score images and write one row each; started again, it goes on with the images that have no score yet.

    Args:
        images: A folder, a glob pattern, or a `.jsonl` file.
        rewards: Names, Python paths, or YAML mappings such as `{reward_model: Geneval, detector: shapes}`.
        prompts: A prompt file with a line per image.
        output: `.jsonl`, `.csv` or `.parquet`; rows wait in `<output>.part` until all images are scored.
        batch_size: Samples per call of a pointwise reward that does not set its own.
        group_size: So many images in a row belong together, of one prompt, for groupwise rewards.

    Returns:
        The rows, in the order of the images.

    Raises:
        ConfigError: An argument is wrong.
        DataError: There are no images, a prompt cannot be read, or the part file is of another scoring.
        RewardError: A reward cannot be built, or requires what the images do not have.
    """
    check_output(output)
    arguments = _arguments(rewards, batch_size)
    files = find_images(images, prompts)
    check_group_size(arguments, group_size, key="--group_size")
    if len(files) % group_size:
        raise ConfigError(f"--group_size {group_size} does not divide the {len(files)} images of {images!r}")
    _check_prompts(arguments, files, group_size)
    check_prompts(arguments, [file.prompt for file in files], source=images)
    part = PartFile(output.with_name(f"{output.name}.part"), arguments, files, group_size=group_size)
    known = part.read()
    missing = [group for group in range(len(files) // group_size) if group not in known]
    failed = [group for group, rows in known.items() if any(row["failures"] for row in rows)]
    if missing or failed:
        accelerator = Distributed().accelerator
        engine = RewardEngine(arguments, factory=lambda entry: build_reward_model(entry, accelerator))
        make_folder(output.parent)
        per_chunk = math.ceil(CHUNK / group_size)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            done = len(files) - group_size * (len(missing) + len(failed))
            task = bar.add_task("images", total=len(files), completed=done)
            for groups in (*_chunks(failed, per_chunk), *_chunks(missing, per_chunk)):
                chunk = {group: files[group * group_size : (group + 1) * group_size] for group in groups}
                known |= part.append(_score(engine, chunk, group_size=group_size))
                bar.advance(task, len(groups) * group_size)
    rows = [row for _, rows in sorted(known.items()) for row in rows]
    write_rows(output, rows)
    part.remove()
    return rows


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a plain text table: a line per reward with images, mean, standard deviation, least, most and failures."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines: list[tuple[str, ...]] = [("reward", "images", "mean", "std", "min", "max", "failed")]
    for name in names:
        values = [row["scores"][name] for row in rows if row["scores"][name] is not None]
        count = len(values)
        if not count:
            lines.append((name, "0", "-", "-", "-", "-", str(len(rows))))
            continue
        mean = math.fsum(values) / count
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / count)
        numbers = (f"{value:.4g}" for value in (mean, std, min(values), max(values)))
        lines.append((name, str(count), *numbers, str(len(rows) - count)))
    return aligned(lines)


def failure_causes(rows: Sequence[Mapping[str, Any]], *, limit: int = 5) -> str:
    """Return the commonest causes of failures as plain text, a line each; "" when nothing failed.

    Causes that differ only in the name of the image count together.
    """
    images: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, text in row["failures"].items():
            images.setdefault((name, text.replace(row["image"], "...")), []).append(row["image"])
    found = sorted(images.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{name} failed on {len(failed)} of {len(rows)} images, first on {failed[0]}: {cause}"
        for (name, cause), failed in found[:limit]
    ]
    more = len(found) - limit
    return "\n".join([*lines, *([f"and {more} more causes"] if more > 0 else [])])


def without_score(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the rewards that scored no image at all."""
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    return [name for name in names if all(row["scores"][name] is None for row in rows)]


def _arguments(rewards: Sequence[str], batch_size: int) -> list[RewardArguments]:
    entries: list[dict[str, Any]] = []
    for text in rewards:
        entries += normalise_rewards(parse_value("rewards", text), key="--rewards")
    defaults = {"batch_size": batch_size, "on_error": "mask"}  # one bad image is a failed row, not the end
    arguments = [validate(RewardArguments, {**defaults, **entry}, source="--rewards") for entry in entries]
    for entry in arguments:
        check_reward(entry)
    return [sealed_reward(entry) for entry in arguments]


def _check_prompts(rewards: Sequence[RewardArguments], files: Sequence[ImageFile], group_size: int) -> None:
    """Refuse images without a prompt where a reward reads it, and groups of several prompts."""
    for start in range(0, len(files), group_size) if groupwise_names(rewards) else ():
        texts = {file.prompt.text: file.path for file in reversed(files[start : start + group_size])}
        if len(texts) > 1:
            (other, second), *_, (one, first) = texts.items()
            raise ConfigError(
                f"--group_size {group_size}: {first} and {second} are of one group, and their prompts are {one!r} and "
                f"{other!r}; a group is so many images of one prompt in a row"
            )
    readers = [reward for reward in rewards if "prompt" in _required_fields(reward)]
    if readers and not all(file.prompt.text for file in files):
        raise RewardError(
            f"reward {readers[0].name!r} requires 'prompt', which these images do not have; give --prompts FILE "
            "(a line per image) or a .jsonl"
        )


def _required_fields(reward: RewardArguments) -> tuple[str, ...]:
    cls = reward_class(reward.reward_model)
    return cls.fields_for(cls.Options.model_validate(dict(reward.options)))


def _chunks(groups: Sequence[int], size: int) -> list[Sequence[int]]:
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def _score(
    engine: RewardEngine, chunk: Mapping[int, Sequence[ImageFile]], *, group_size: int
) -> dict[int, list[Mapping[str, Any]]]:
    """Return the rows of each group; one whose image cannot be read is scored without it.

    Asynchronous rewards begin with the first images while the others are read.
    """
    files = [(group, file) for group, files in chunk.items() for file in files]
    unread: dict[int, DataError] = {}  # place -> why
    with engine.begin(group_size=group_size) as scoring:
        for place, (group, file) in enumerate(files):
            try:
                image = file.load()
            except DataError as error:  # this image's row tells it; the others can still be scored
                unread[place] = error
                continue
            scoring.add([file.prompt], [group], images=[image])
        table = scoring.finish()
    readable = Counter(group for place, (group, _) in enumerate(files) if place not in unread)
    compared = groupwise_names(engine.rewards)
    rows: dict[int, list[Mapping[str, Any]]] = {group: [] for group in chunk}
    places = iter(range(len(files)))  # in the table
    for place, (group, file) in enumerate(files):
        error = unread.get(place)
        if error is not None:
            rows[group].append(_failed_row(file, engine.names, error))
            continue
        row = _row(file, table, next(places))
        rows[group].append(_alone(row, compared) if readable[group] == 1 else row)
    return rows


def _alone(row: Mapping[str, Any], groupwise: Sequence[str]) -> Mapping[str, Any]:
    """Return a row without the scores of groupwise rewards: there was no image to compare its own with."""
    return {
        **row,
        "scores": {**row["scores"], **dict.fromkeys(groupwise)},
        "info": {name: cells for name, cells in row["info"].items() if name not in groupwise},
        "failures": {**row["failures"], **dict.fromkeys(groupwise, "no other image of its group can be read")},
    }


def _failed_row(file: ImageFile, names: Sequence[str], error: DataError) -> Mapping[str, Any]:
    scores = dict.fromkeys(names)
    failures = {name: f"DataError: {error}" for name in names}
    return {"image": str(file.path), "prompt": file.prompt.text, "scores": scores, "info": {}, "failures": failures}


def _row(file: ImageFile, table: RewardTable, index: int) -> Mapping[str, Any]:
    scores = {name: table.scores[index, column].item() for column, name in enumerate(table.names)}
    failed = {f.reward: f"{f.kind}: {f.message}" for f in table.failures if index in f.samples}
    info = {
        name: {key: plain(cells[index]) for key, cells in columns.items() if cells[index] is not None}
        for name, columns in table.extra_info.items()
    }
    return {
        "image": str(file.path),
        "prompt": file.prompt.text,
        "scores": {name: finite_or_none(value) for name, value in scores.items()},
        "info": {name: cells for name, cells in info.items() if cells},
        "failures": failed,
    }
