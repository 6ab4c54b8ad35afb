"""The report of a reward-training run, from whole, empty and damaged folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import Page
from tiltflow.errors import DataError
from tiltflow.report import write_reward_report
from tiltflow.report.contents import read_run
from tiltflow.report.reward_page import figures, progress_text, smoothed, validation_sets
from tiltflow.reward_training.best import write_model

CONFIG = "train:\n  keep_best:\n    metric: validation_a/acc\n    mode: max\n"


def make_folder(folder: Path, *, steps: int = 80, data: dict[str, Any] | None = None) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "time": 0.0, "train/loss": 1 / step, "train/acc": 0.5, "lr": 1e-5}
        row |= {"train/pairs": 8.0, "train/skipped": 0.0, "train/unreadable": float(step == 7)}
        row |= {"grad_norm": None if step == 3 else 1.0, "samples": 8.0 * step, "step_seconds": 0.5}
        if step % 20 == 0:
            row |= {"validation_a/loss": 0.5, "validation_a/acc": step / 100, "validation_b/margin": 2.0}
            row |= {"validation_seconds": 3.0}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "data.json").write_text(
        json.dumps(data or {"total_steps": 100, "train": 640, "validation": {"a": 9}, "left_out": {"<b>ties</b>": 4}})
    )
    for step, acc in ((20, 0.2), (40, 0.4)):
        metrics = {"validation_a/acc": acc, "validation_a/loss": 0.5, "train/loss": 1.0}
        write_model(folder / "best" / f"step_{step:06d}", step, metrics, lambda path: None)
    return folder


def test_curves_of_training_and_of_each_set(tmp_path: Path) -> None:
    run = read_run(make_folder(tmp_path))
    assert validation_sets(run) == ["validation_a", "validation_b"]
    found = {figure.title: figure for figure in figures(run)}
    assert list(found) == ["loss", "acc", "unreadable", "margin", "grad_norm", "lr"]
    assert "train" in found["loss"].svg and "validation_a" in found["loss"].svg
    assert "means of 2 steps" in found["loss"].text and "learns its examples by heart" in found["loss"].text
    assert "<path" in found["margin"].svg and "train" not in found["margin"].svg
    assert progress_text(run, 100) == (
        "Step 80 of 100 (still running, or stopped before its end), 640 examples, 40 s of training and 12 s of "
        "validation."
    )


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    page = Page(write_reward_report(make_folder(tmp_path)).read_text())
    assert page.resources == [] and "script" not in page.tags and "b" not in page.tags
    assert "best/step_000040 40 0.4000 0.5000 best/step_000020 20 0.2000 0.5000" in page.text
    assert "By validation_a/acc" in page.text and "<b>ties</b> 4" in page.text
    assert page.tags.count("svg") == 6


def test_missing_and_damaged_parts_become_sentences(tmp_path: Path) -> None:
    text = Page(write_reward_report(tmp_path).read_text()).text
    for words in (
        "No step has been recorded",
        "no metrics to draw",
        "Nothing is known about the data",
        "no config.yaml",
    ):
        assert words in text
    folder = tmp_path / "run"
    folder.mkdir()
    make_folder(folder)
    (folder / "data.json").write_text("{")
    (folder / "best" / "step_000020" / "metrics.json").write_text("[]")
    text = Page(write_reward_report(folder).read_text()).text
    assert "data.json cannot be read" in text and "step_000020/metrics.json cannot be read" in text
    assert "No model has been kept yet; validation_a/acc decides" in text
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="does not exist"):
        write_reward_report(folder)


def test_smoothing() -> None:
    assert smoothed([1.0, None, 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]
    assert smoothed([None, 1.0], 1) == [None, 1.0]
