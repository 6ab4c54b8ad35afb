"""What a report shows, read from the folder of a run; whatever is missing becomes a sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tiltflow.data import PROMPT_SETS
from tiltflow.errors import DataError
from tiltflow.evaluation import (
    Difference,
    Estimate,
    EvaluationResult,
    EvaluationRow,
    few_prompts_note,
    paired_difference,
)
from tiltflow.runtime.tracking import read_jsonl

GLOSSES = {
    "strict": "images that show exactly the objects asked for, no more",
    "correct": "images that show at least the objects asked for (the leaderboard's rule)",
    "partial": "how much of the prompt an image shows, averaged",
}


@dataclass(frozen=True)
class Run:
    """The readable parts of a run's folder."""

    folder: Path
    metrics: Sequence[dict[str, Any]]  # one per step, in order
    config: str | None
    before: EvaluationResult | None
    after: EvaluationResult | None
    problems: Sequence[str]  # files that exist and cannot be read

    @property
    def results(self) -> list[EvaluationResult]:
        """The evaluations that exist, before first."""
        return [result for result in (self.before, self.after) if result is not None]

    @property
    def settings(self) -> dict[str, Any]:
        """The config's content, empty where it cannot be read."""
        try:
            content = yaml.safe_load(self.config or "")
        except yaml.YAMLError:
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def epochs_planned(self) -> int | None:
        """`train.epochs` of the config, where it can be read."""
        train = self.settings.get("train")
        epochs = train.get("epochs") if isinstance(train, dict) else None
        return epochs if isinstance(epochs, int) else None

    def curve(self, key: str) -> tuple[list[int], list[float | None]]:
        """Return the steps and values of a metric; steps without the key are left out."""
        rows = [row for row in self.metrics if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Return what stands between prefix and suffix in the metrics' keys, in order of appearance."""
        keys = dict.fromkeys(key for row in self.metrics for key in row)
        inner = [key[len(prefix) : len(key) - len(suffix)] for key in keys if _is_between(key, prefix, suffix)]
        return [name for name in inner if name]

    def total(self, key: str) -> float:
        """Return the sum of a metric over the run."""
        return sum(value for value in self.curve(key)[1] if value is not None)


@dataclass(frozen=True)
class Card:
    """One headline number, before and after."""

    key: str
    gloss: str
    before: Estimate | None
    after: Estimate | None
    difference: Difference | None  # over the same prompts and noise


@dataclass(frozen=True)
class Shot:
    """One image file and what the rewards said about it."""

    path: Path
    strict: bool | None  # the verdict of the first reward that judges as GenEval does; None: there is none
    remark: str  # why it is not as asked, or the scores where there is no verdict


@dataclass(frozen=True)
class Pair:
    """The images of one prompt and noise; one side may be missing."""

    prompt: str
    before: Shot | None
    after: Shot | None


@dataclass(frozen=True)
class TagRow:
    """One line of the table per tag: the key and, per evaluation, its estimates."""

    tag: str
    images: int
    cells: Sequence[Estimate | None]  # correct before, correct after, strict before, strict after


def read_run(run_dir: Path) -> Run:
    """Read a run's folder, finished or not.

    Raises:
        DataError: There is no such folder.
    """
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the output_dir of a run")
    problems: list[str] = []
    config = run_dir / "config.yaml"
    metrics = _metrics(run_dir / "metrics.jsonl", problems)
    after = _result(run_dir / "evaluations" / "after.json", problems)
    trained = max((row["step"] for row in metrics if "loss" in row), default=0)
    if after is not None and after.settings.get("epoch", trained) < trained:
        after = None  # the run was extended: its end is not measured yet
    return Run(
        run_dir,
        metrics,
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        _result(run_dir / "evaluations" / "before.json", problems),
        after,
        problems,
    )


def headline(run: Run) -> tuple[list[Card], list[str]]:
    """Return the main numbers and plain sentences about the first of them and about how they were measured."""
    keys = list(dict.fromkeys(key for result in run.results for key in main_keys(result)))
    cards, sentences = list[Card](), list[str]()
    for key in keys:
        before, after = (result.summary.get(key) if result else None for result in (run.before, run.after))
        difference = None
        if run.before and run.after and before and after:
            try:
                difference = paired_difference(run.before, run.after, key)
            except DataError as error:
                sentences += [str(error)] if str(error) not in sentences else []
        cards.append(Card(key, GLOSSES.get(key.rpartition("_")[2], "mean score"), before, after, difference))
    first = cards[0] if cards else None
    if first and first.before and first.after:
        prompts = min(len({row.group for row in result.rows}) for result in run.results)
        sentences.insert(0, verdict(first.key, first.before, first.after, first.difference, prompts=prompts))
    return cards, [*sentences, *_measured(run)]


def main_keys(result: EvaluationResult) -> list[str]:
    """Return the keys that sum an evaluation up: strict, correct and partial, or the mean score, of each reward."""
    keys: list[str] = []
    for name in dict.fromkeys(name for row in result.rows for name in row.scores):
        prefix = name.lower()
        judged = [f"{prefix}_{kind}" for kind in ("strict", "correct", "partial")]
        keys += judged if judged[0] in result.summary else [prefix]
    return keys


def verdict(key: str, before: Estimate, after: Estimate, difference: Difference | None, *, prompts: int) -> str:
    """Say in one to three sentences what changed and how sure that is.

    Args:
        key: Of the summary.
        before: Its value before training.
        after: And after.
        difference: The change over the same prompts and noise; None: not known.
        prompts: How many each value is over.
    """
    moved = ""  # of NaN, where nothing could be scored
    if before.value <= after.value or after.value <= before.value:
        moved = " stayed" if before.value == after.value else " rose" if after.value > before.value else " fell"
    text = f"{key}{moved}: {before} before, {after} after"
    if moved in ("", " stayed") or not (math.isfinite(before.low) and math.isfinite(after.low)):
        return f"{text}."
    apart = before.high < after.low or after.high < before.low
    # Intervals that are too short are no ground to say that they lie apart.
    note = few_prompts_note(prompts)
    text += f". {note}" if note else f"; the 95% intervals {'do not overlap' if apart else 'overlap'}."
    if difference is None or not math.isfinite(difference.low):
        return text
    meaning = "which includes zero, so the change may be chance"
    if difference.is_certain:
        meaning = "which excludes zero, so chance alone is an unlikely cause"
    elif difference.low > 0 or difference.high < 0:
        meaning = "which a t-test over the prompts does not tell from chance"
    return f"{text} For the same prompts and noise the difference is {difference_text(difference)}, {meaning}."


def difference_text(item: Estimate) -> str:
    """Return a signed `value [low, high]`, without the bracket where there is no interval."""
    interval = f" [{item.low:+.3f}, {item.high:+.3f}]" if math.isfinite(item.low) else ""
    return f"{item.value:+.3f}{interval}"


def interval_sentence(run: Run, cards: Sequence[Card]) -> str:
    """Say what the intervals on the cards are; "" where there is none."""
    estimates = [item for card in cards for item in (card.before, card.after) if item is not None]
    if not any(math.isfinite(item.low) for item in estimates):
        return ""
    notes = [few_prompts_note(len({row.group for row in result.rows})) for result in run.results]
    made = "from resampling the prompts; from the images alone where a rate does not vary or there is one prompt."
    return " ".join(filter(None, [f"In brackets: 95% intervals, {made}", *dict.fromkeys(notes)]))


def evaluation_curves(run: Run) -> dict[str, list[str]]:
    """Return, per reward (its name in lower case), the `eval/` keys that sum it up: one, or strict and partial.

    Counts of failures, single tags and what GenEval's leaderboard calls correct are left to the tables.
    """
    names = run.names("eval/")
    judged = [name.removesuffix("_strict") for name in names if name.endswith("_strict")]
    curves = {name: [key for key in (f"{name}_strict", f"{name}_partial") if key in names] for name in judged}
    taken = tuple(f"{name}_{kind}" for name in judged for kind in ("strict", "correct", "partial"))
    for key in names:
        if key not in judged and not key.startswith(taken) and not key.endswith("_failures"):
            curves[key] = [key]
    return curves


def reward_entries(run: Run, key: str) -> list[Any]:
    """Return the entries of `rewards` or `eval_rewards` in the config, unchecked."""
    entries = run.settings.get(key)
    return entries if isinstance(entries, list) else []


def trains_on_evaluation(run: Run) -> bool:
    """Tell whether the run trains on the file that it is evaluated on: only named sets have a split for each."""
    data = run.settings.get("data")
    if not isinstance(data, dict):
        return False
    trained, measured = data.get("prompts"), data.get("eval_prompts")
    if not isinstance(trained, str) or not isinstance(measured, str):
        return False
    return measured not in PROMPT_SETS and Path(trained) == Path(measured)


def pairs(run: Run, *, limit: int) -> list[Pair]:
    """Return up to `limit` images, spread over all that both evaluations kept (or the only one that kept any)."""
    folder = run.folder / "evaluations"
    shots = [_shots(result, folder) if result else {} for result in (run.before, run.after)]
    places = sorted(shots[0].keys() & shots[1].keys() or shots[0].keys() | shots[1].keys())
    chosen = places if len(places) <= limit else [places[i * len(places) // limit] for i in range(limit)]
    prompts = {(row.group, row.sample): row.prompt for result in run.results for row in result.rows}
    return [Pair(prompts[place], shots[0].get(place), shots[1].get(place)) for place in chosen]


def tag_tables(run: Run) -> dict[str, list[TagRow]]:
    """Return, per reward that judges as GenEval does, a line per tag and one for their unweighted mean."""
    summaries = [result.summary if result else {} for result in (run.before, run.after)]
    tables: dict[str, list[TagRow]] = {}
    for name in dict.fromkeys(name for result in run.results for row in result.rows for name in row.scores):
        marker = f"{name.lower()}_correct_"
        tags = list(dict.fromkeys(key[len(marker) :] for part in summaries for key in part if key.startswith(marker)))
        if tags:
            tables[name] = [_tag_row(name.lower(), tag, summaries) for tag in (*tags, "")]
    return tables


def timings(run: Run) -> list[tuple[str, float, float]]:
    """Return (stage, mean seconds per epoch, total seconds), what no stage accounts for as "other"."""
    stages = [name for name in run.names("seconds/") if name != "epoch"]
    rows = [(name, run.total(f"seconds/{name}"), len(run.curve(f"seconds/{name}")[0])) for name in stages]
    other = run.total("seconds/epoch") - sum(total for _, total, _ in rows)
    if other > 0:
        rows.append(("other", other, len(run.curve("seconds/epoch")[0])))
    return [(name, total / count, total) for name, total, count in rows]


def failures(run: Run) -> list[tuple[str, str, int]]:
    """Return (where, reward, images without a score and the causes known) for every reward that ever failed."""
    found = [("training", name, int(run.total(f"failures/{name}"))) for name in run.names("failures/")]
    for result in run.results:
        for name in dict.fromkeys(name for row in result.rows for name in row.scores):
            missing = [row for row in result.rows if row.scores.get(name) is None]
            causes = dict.fromkeys(str(row.info.get(name, {}).get("failure", "unknown")) for row in missing)
            label = f"{name} ({'; '.join(list(causes)[:3])})" if missing else name
            found.append((f"evaluation {result.name!r}", label, len(missing)))
    return [entry for entry in found if entry[2] > 0]


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read the metrics, rows of one step merged."""
    if not path.is_file():
        return []
    try:
        rows = read_jsonl(path)
    except DataError as error:
        problems.append(str(error))
        return []
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _result(path: Path, problems: list[str]) -> EvaluationResult | None:
    if not path.is_file():
        return None
    try:
        return EvaluationResult.load(path)
    except DataError as error:
        problems.append(str(error))
        return None


def _measured(run: Run) -> list[str]:
    """Say how the evaluations were made, and what differs between them."""
    if not run.results:
        return []
    settings = run.results[-1].settings
    shown = {"images": "images", "prompts": "prompts", "num_steps": "sampling steps", "guidance_scale": "guidance"}
    parts = [f"{label} {settings[key]}" for key, label in shown.items() if key in settings]
    sentences = [f"How it was measured: {', '.join(parts)}."] if parts else []
    if run.before and run.after:
        first, second = run.before.settings, run.after.settings
        keys = [key for key in {**first, **second} if key != "epoch" and first.get(key) != second.get(key)]
        changes = [f"{key} ({first.get(key)} before, {second.get(key)} after)" for key in keys]
        sentences += [f"Careful: the two evaluations differ in {', '.join(changes)}."] if changes else []
    return sentences


def _shots(result: EvaluationResult, folder: Path) -> dict[tuple[int, int], Shot]:
    """Return the images that exist, by (prompt, sample)."""
    shots: dict[tuple[int, int], Shot] = {}
    root = folder.resolve()
    for row in result.rows:
        if row.image is None:
            continue
        path = folder / row.image
        # A result file from elsewhere must not pull other files of this machine into a page that gets shared.
        if path.resolve().is_relative_to(root) and path.is_file():
            shots[row.group, row.sample] = _shot(row, path)
    return shots


def _shot(row: EvaluationRow, path: Path) -> Shot:
    judged = [cells for cells in row.info.values() if "strict" in cells]
    if not judged:
        scores = {name: "no score" if score is None else f"{score:.3g}" for name, score in row.scores.items()}
        return Shot(path, None, "; ".join(f"{name} {score}" for name, score in scores.items()))
    strict = bool(judged[0]["strict"])
    return Shot(path, strict, "" if strict else "; ".join(str(reason) for reason in judged[0].get("reasons", ())))


def _tag_row(prefix: str, tag: str, summaries: Sequence[Any]) -> TagRow:
    suffix = f"_{tag}" if tag else ""
    cells = [part.get(f"{prefix}_{kind}{suffix}") for kind in ("correct", "strict") for part in summaries]
    return TagRow(tag or "mean over tags", max(cell.count for cell in cells if cell is not None), cells)


def _is_between(key: str, prefix: str, suffix: str) -> bool:
    return key.startswith(prefix) and key.endswith(suffix) and len(key) > len(prefix) + len(suffix)
