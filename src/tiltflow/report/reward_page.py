"""The HTML report of a run that trained a reward model: curves of each set, the models kept, what was left out."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tiltflow.errors import TiltflowError
from tiltflow.report.charts import Series, Value, line_chart
from tiltflow.report.contents import Run, read_run
from tiltflow.report.page import Figure, duration, templates
from tiltflow.reward_training.best import BestModel, kept_models
from tiltflow.reward_training.shown import COUNT, FOLDER, INDEX
from tiltflow.runtime.checkpoint import write_atomically

DATA_FILE = "data.json"  # {"total_steps": 12, "train": 45, "validation": {"all": 21}, "left_out": {"ties": 3}}
TEMPLATE = "reward_template.html"
MAX_COLUMNS = 6
LEADING = ("loss", "acc")  # shown before all other metrics
COUNTS = ("pairs",)  # these follow from the size of the batches: no curve
SMOOTHED_POINTS = 40  # a curve of training is averaged so that about so many separate values are left

TEXTS = {
    "loss": "What training descends. A loss that falls in training and rises in validation means that the model learns "
    "its examples by heart.",
    "acc": "How often the preferred one of a pair has the higher score.",
    "grad_norm": "The length of each step's gradient before it was clipped.",
    "lr": "The learning rate.",
}


@dataclass(frozen=True)
class KeptRow:
    """One line of the table of models."""

    folder: str
    step: int
    cells: Sequence[str]


@dataclass(frozen=True)
class ExampleRow:
    """One validation example."""

    set: str
    caption: str
    images: Sequence[tuple[Path, str]]  # each with what the model says of it


def write_reward_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from what the folder holds; parts that are missing become a sentence.

    Reads `metrics.jsonl`, `config.yaml`, `data.json`, `best/` and `examples/`.

    Returns:
        The report's path.

    Raises:
        DataError: There is no such folder.
        CheckpointError: The system refused to write.
    """
    path = run_dir / "report.html"
    write_atomically(path, render_reward(read_run(run_dir)))
    return path


def render_reward(run: Run) -> str:
    """Return the report as HTML."""
    data, problems = _data(run.folder / DATA_FILE)
    examples, unread = shown_examples(run.folder / FOLDER)
    models, more = _kept(run)
    columns = columns_of(models, run)
    return (
        templates()
        .get_template(TEMPLATE)
        .render(
            name=run.folder.resolve().name,
            progress=progress_text(run, data.get("total_steps")),
            problems=[*run.problems, *problems, *more, *unread],
            figures=figures(run),
            columns=columns,
            rows=[_row(model, columns) for model in models],
            metric=keep_best(run).get("metric"),
            data=data,
            examples=examples,
            config=run.config,
        )
    )


def shown_examples(folder: Path) -> tuple[list[ExampleRow], list[str]]:
    """Return the examples of the last validation, at most `COUNT`, and what cannot be read."""
    path = folder / INDEX
    if not path.is_file():
        return [], []
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return [
            ExampleRow(
                str(each["set"]),
                str(each["caption"]),
                [(folder / str(file), str(note)) for file, note in zip(each["images"], each["notes"], strict=True)],
            )
            for each in content[:COUNT]
        ], []
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], [f"{folder.name}/{path.name} cannot be read: {error}"]


def figures(run: Run) -> list[Figure]:
    """Return a curve of each metric, training and the validation sets together, then gradient norm and rate."""
    sets = validation_sets(run)
    names = list(dict.fromkeys([*run.names("train/"), *(name for key in sets for name in run.names(f"{key}/"))]))
    first = [name for name in LEADING if name in names]
    names = [name for name in names if name in first or (name not in COUNTS and _ever(run, name, sets))]
    found = [_metric_figure(run, name, sets) for name in [*first, *(name for name in names if name not in first)]]
    found += [_figure(key, [Series(key, *run.curve(key))]) for key in ("grad_norm", "lr")]
    return [figure for figure in found if figure.svg]


def validation_sets(run: Run) -> list[str]:
    """Return what validation metrics begin with: `validation`, or `validation_<name>` of each set."""
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    return list(dict.fromkeys(key.partition("/")[0] for key in keys if key.startswith("validation") and "/" in key))


def smoothed(values: Sequence[Value], window: int) -> list[Value]:
    """Return means of the last `window` values, those that are missing left out."""
    means: list[Value] = []
    for index in range(len(values)):
        known = [value for value in values[max(0, index + 1 - window) : index + 1] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def progress_text(run: Run, planned: int | None) -> str:
    """Say how far the run has come and how long that took."""
    steps = [row["step"] for row in run.metrics if "step_seconds" in row]
    if not steps:
        return "No step has been recorded yet."
    text = f"Step {steps[-1]}" + (f" of {planned}" if planned else "")
    if planned and steps[-1] < planned:
        text += " (still running, or stopped before its end)"
    samples = [value for value in run.curve("samples")[1] if value is not None]
    seen = f", {samples[-1]:,.0f} examples" if samples else ""
    seconds = run.total("step_seconds")
    return (
        f"{text}{seen}, {duration(seconds)} of training and {duration(run.total('validation_seconds'))} of validation."
    )


def keep_best(run: Run) -> dict[str, Any]:
    """Return `train.keep_best` of the config, empty where there is none."""
    train = run.settings.get("train")
    chosen = train.get("keep_best") if isinstance(train, dict) else None
    return chosen if isinstance(chosen, dict) else {}


def columns_of(models: Sequence[BestModel], run: Run) -> list[str]:
    """Return the metrics that the table of models shows, the one that decides first."""
    names = dict.fromkeys(name for model in models for name in model.metrics if name.startswith("validation"))
    first = [name for name in [keep_best(run).get("metric")] if name in names]
    rest = [name for name in names if name not in first and "/" in name]
    preferred = sorted(rest, key=lambda name: name.rpartition("/")[2] not in LEADING)
    return [*first, *preferred][:MAX_COLUMNS]


def _kept(run: Run) -> tuple[list[BestModel], list[str]]:
    """Return the models that were kept, the best first, and what cannot be read."""
    try:
        models = kept_models(run.folder / "best")
    except TiltflowError as error:
        return [], [str(error)]
    chosen = keep_best(run)
    sign = -1 if chosen.get("mode") == "max" else 1

    def rank(model: BestModel) -> tuple[float, int]:
        value = model.metrics.get(str(chosen.get("metric")))
        return (math.inf if value is None else sign * value, model.step)

    return sorted(models, key=rank), []


def _row(model: BestModel, columns: Sequence[str]) -> KeptRow:
    values = [model.metrics.get(name) for name in columns]
    cells = ["-" if value is None else f"{value:.4f}" for value in values]
    return KeptRow(f"best/{model.folder.name}", model.step, cells)


def _ever(run: Run, name: str, sets: Sequence[str]) -> bool:
    """Tell whether a metric is ever another number than 0, as a count of what is left out may not be."""
    return any(value for key in ("train", *sets) for value in run.curve(f"{key}/{name}")[1])


def _metric_figure(run: Run, name: str, sets: Sequence[str]) -> Figure:
    steps, values = run.curve(f"train/{name}")
    window = max(1, len(values) // SMOOTHED_POINTS)
    series = [Series("train", steps, smoothed(values, window))] if steps else []
    series += [Series(key, *run.curve(f"{key}/{name}")) for key in sets]
    note = f" Training: means of {window} steps." if window > 1 and steps else ""
    return _figure(name, [one for one in series if one.x], note=note)


def _figure(name: str, series: Sequence[Series], *, note: str = "") -> Figure:
    svg = line_chart(series, title=f"{name} by step", x_label="step")
    return Figure(name, (TEXTS.get(name, "") + note).strip(), Markup(svg))


def _data(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what is known about the data, empty where nothing is, and what cannot be read."""
    if not path.is_file():
        return {}, []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"{path.name} cannot be read: {error}"]
    return (content, []) if isinstance(content, dict) else ({}, [f"{path.name} holds no mapping"])
