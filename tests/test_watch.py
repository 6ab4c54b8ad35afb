"""The watch for reward hacking, on evaluations and training rewards whose numbers are known, and in a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import run_values
from tiltflow import cli
from tiltflow.commands.evaluator import training_rewards
from tiltflow.errors import DataError
from tiltflow.evaluation import EvaluationResult, EvaluationRow, HackingWatch, hacking_signs, summarise
from tiltflow.runtime.tracking import read_jsonl


def result(level: float, *, name: str = "hps", prompts: int = 8) -> EvaluationResult:
    """Return an evaluation whose held-out scores lie around a level, a little different for each prompt."""
    rows = [
        EvaluationRow(f"prompt {g}", s, g, {name: level + 0.01 * g + 0.001 * s}) for g in range(prompts) for s in (0, 1)
    ]
    return EvaluationResult(name, {}, summarise(rows), rows)


def test_a_fall_beside_a_rise_is_a_sign() -> None:
    (sign,) = hacking_signs(result(0.5), result(0.4), training_before={"pick": 1.0}, training_after={"pick": 1.5})
    assert (sign.held_out, sign.training) == ("hps", "pick")
    assert (sign.fall, sign.rise) == (pytest.approx(-0.1), pytest.approx(0.5))
    assert str(sign) == "held-out reward 'hps' fell by 0.1 while the training reward 'pick' rose by 0.5"


@pytest.mark.parametrize(
    ("later", "after"),
    [(0.5, {"pick": 1.5}), (0.6, {"pick": 1.5}), (0.4, {"pick": 1.0}), (0.4, {"pick": 0.5}), (0.4, {})],
)
def test_no_fall_or_no_rise_is_none(later: float, after: dict[str, float]) -> None:
    assert hacking_signs(result(0.5), result(later), training_before={"pick": 1.0}, training_after=after) == []


def test_a_fall_within_the_noise_is_none() -> None:
    earlier, later = result(0.5), result(0.5)
    for row in later.rows:
        row.scores["hps"] += 0.05 if row.group % 2 else -0.06  # type: ignore[index,operator]
    assert hacking_signs(earlier, later, training_before={"pick": 1.0}, training_after={"pick": 1.5}) == []


def test_a_reward_that_is_trained_on_is_no_witness() -> None:
    rewards = {"training_before": {"hps": 1.0, "pick": 1.0}, "training_after": {"hps": 0.5, "pick": 1.5}}
    assert hacking_signs(result(0.5), result(0.4), **rewards) == []


def test_evaluations_of_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="not of the same prompts"):
        hacking_signs(result(0.5), result(0.4, prompts=7), training_before={"a": 0.0}, training_after={"a": 1.0})


def test_the_watch_compares_with_the_last_good_evaluation_and_loses_its_patience() -> None:
    watch = HackingWatch(patience=2)
    for level, reward, streak in ((0.5, 1.0, 0), (0.52, 1.2, 0), (0.50, 1.4, 1), (0.53, 1.5, 0), (0.4, 1.6, 1)):
        watch.observe(result(level), {"pick": reward})
        assert (watch.streak, watch.should_stop) == (streak, False)
    # falling no further, but still below the last good one
    assert watch.observe(result(0.45), {"pick": 1.7})
    assert (watch.streak, watch.should_stop) == (2, True)


def test_without_patience_it_only_warns() -> None:
    watch = HackingWatch(patience=None)
    for level in (0.5, 0.4, 0.3, 0.2):
        watch.observe(result(level), {"pick": 1 - level})
    assert (watch.streak, watch.should_stop) == (3, False)


def test_training_rewards_are_means_over_epochs() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "reward/a/mean": 1.0, "reward/a/std": 9.0},
        {"step": 2, "reward/a/mean": 2.0, "reward/b/mean": None},
        {"step": 2, "eval/hps": 3.0},
    ]
    assert training_rewards(rows) == {"a": 1.5}


def test_a_run_that_hacks_its_reward_is_stopped_and_stays_stopped(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(
        random_sd3,
        tmp_path / "out",
        train={"epochs": 20, "evaluate_every": 2, "early_stop": 2, "save_every": 50},
        rewards=[{"name": "trained", "reward_model": "tests.rewards_for_tests.Rising"}],
        eval_rewards=[{"name": "held", "reward_model": "tests.rewards_for_tests.Falling"}],
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: epoch ")]
    # the evaluation of epoch 2 is the first to compare with; those of 4 and 6 have fallen
    assert [line.split(":")[1].strip() for line in told] == ["epoch 4", "epoch 6"]
    assert "held-out reward 'held' fell by 1 while the training reward 'trained' rose by 2" in told[0]
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert max(row["step"] for row in rows if "loss" in row) == 6
    assert (tmp_path / "out" / "latest").resolve().name == "epoch_000006"
    assert EvaluationResult.load(tmp_path / "out" / "evaluations" / "after.json").settings["epoch"] == 6
    manifest = tmp_path / "out" / "epoch_000006" / "manifest.json"
    written = manifest.stat().st_ino, manifest.stat().st_mtime_ns
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert max(row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 6
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == written


def test_early_stop_needs_something_to_watch(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(random_sd3, tmp_path / "out", train={"early_stop": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "train.early_stop=2 compares evaluations of held-out rewards" in capsys.readouterr().err
