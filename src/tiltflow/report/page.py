"""The HTML report of a run: one file that needs nothing else, finished or not."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from tiltflow.evaluation import Estimate
from tiltflow.report import contents, witnesses
from tiltflow.report.charts import Series, line_chart, spans_decades, stacked_bar
from tiltflow.report.contents import Run, read_run
from tiltflow.runtime.checkpoint import write_atomically

TEMPLATE = "template.html"
MAX_PAIRS = 16
MAX_IMAGE_SIDE = 320  # pixels; larger images are shrunk for the page


@dataclass(frozen=True)
class Figure:
    """A chart and what it means."""

    title: str
    text: str
    svg: Markup


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from what the folder holds; parts that are missing become a sentence.

    Reads `metrics.jsonl`, `config.yaml`, `evaluations/before.json` and `evaluations/after.json`.

    Returns:
        The report's path.

    Raises:
        DataError: There is no such folder.
        CheckpointError: The system refused to write.
    """
    path = run_dir / "report.html"
    write_atomically(path, render(read_run(run_dir)))
    return path


def render(run: Run) -> str:
    """Return the report as HTML."""
    cards, sentences = contents.headline(run)
    pairs = contents.pairs(run, limit=MAX_PAIRS)
    timings = contents.timings(run)
    return (
        templates()
        .get_template(TEMPLATE)
        .render(
            run=run,
            problems=run.problems,
            name=run.folder.resolve().name,
            progress=progress_text(run),
            cards=cards,
            sentences=sentences,
            intervals=contents.interval_sentence(run, cards),
            rows_of_figures=[row for row in (reward_figures(run), update_figures(run)) if row],
            pairs=pairs,
            has_ticks=any(shot and shot.strict is not None for pair in pairs for shot in (pair.before, pair.after)),
            tag_tables=contents.tag_tables(run),
            timings=timings,
            timing_bar=Markup(stacked_bar([(name, total) for name, _, total in timings], title="share of each stage")),
            failures=contents.failures(run),
        )
    )


def templates() -> Environment:
    """Return the templates of the reports."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(estimate=estimate_text, duration=duration, picture=data_uri)
    environment.filters["difference"] = contents.difference_text
    return environment


def reward_figures(run: Run) -> list[Figure]:
    """Return the curves of the training rewards and, beside them, one of each reward that evaluations measure."""
    found = [_reward_figure(run, name) for name in run.names("reward/", "/mean")]
    held_out = witnesses.held_out(run)
    found += [
        _evaluation_figure(run, name, keys, held_out=held_out.get(name))
        for name, keys in contents.evaluation_curves(run).items()
    ]
    return [figure for figure in found if figure.svg]


def update_figures(run: Run) -> list[Figure]:
    """Return the curves that tell how the updates went."""
    loss = run.curve("loss")[1]
    found = [
        _figure(
            run,
            "loss",
            "Loss",
            "What each update descends. Its target moves along with the policy, so it need not fall while the reward "
            "rises.",
            log=spans_decades(loss),
        )
    ]
    found.append(
        _figure(
            run,
            "drift",
            "Drift from the reference",
            "Mean ‖v - v_ref‖²: how far the trained velocity has moved from the base model's. Much drift for little "
            "reward is a warning.",
        )
    )
    found.append(
        _figure(
            run,
            "grad_norm",
            "Gradient norm",
            "The length of each epoch's gradient; sudden peaks mean unstable updates.",
        )
    )
    return [figure for figure in found if figure.svg]


def progress_text(run: Run) -> str:
    """Say how far the run has come and how long that took."""
    epochs = [row for row in run.metrics if "loss" in row or "seconds/epoch" in row]
    if not epochs:
        return "No epoch has been recorded yet."
    last, planned = epochs[-1]["step"], run.epochs_planned
    text = f"Epoch {last}" + (f" of {planned}" if planned and last <= planned else "")
    if planned and last < planned:
        text += " (still running, or stopped before its end)"
    seconds = run.total("seconds/epoch")
    return f"{text}, {duration(seconds)} of training." if seconds else f"{text}."


def estimate_text(item: Estimate | None) -> str:
    """Return `value [low, high]`, or a dash for a missing estimate."""
    return "-" if item is None else str(item)


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def data_uri(path: Path) -> str:
    """Return an image file as a data URI of a PNG, large ones shrunk; "" for a file that is no image."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return ""
    small.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _reward_figure(run: Run, name: str) -> Figure:
    steps, mean = run.curve(f"reward/{name}/mean")
    spread_at = dict(zip(*run.curve(f"reward/{name}/std"), strict=True))
    series = Series(name, steps, mean, [spread_at.get(step) for step in steps])
    text = (
        "Mean score of the images made in each epoch for training; the band is ± one standard deviation over them. "
        "This is the curve that training should raise."
    )
    return Figure(f"Reward: {name}", text, Markup(line_chart([series], title=f"Reward {name} by epoch")))


def _evaluation_figure(run: Run, name: str, keys: Sequence[str], *, held_out: bool | None) -> Figure:
    series = [Series(key, *run.curve(f"eval/{key}")) for key in keys]
    # Before and after alone stand in the table above: two points are no curve.
    drawn = [each for each in series if len(each.x) > 2]
    unseen = "" if contents.trains_on_evaluation(run) else ", which training never sees"
    text = f"Mean on the evaluation prompts{unseen}, from the same noise each time."
    if held_out:
        text += " Not trained on: a fall here while the training reward rises means that one is being gamed."
    svg = Markup(line_chart(drawn, title=f"{name} on the evaluation prompts by epoch"))
    return Figure(f"{'Held out' if held_out else 'Evaluation'}: {name}", text, svg)


def _figure(run: Run, key: str, title: str, text: str, *, log: bool = False) -> Figure:
    svg = line_chart([Series(key, *run.curve(key))], title=f"{title} by epoch", log=log)
    return Figure(title, text + (" Logarithmic scale." if log else ""), Markup(svg))
