"""The watch for reward hacking, on evaluations and training rewards whose numbers are known, and in a run."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from tests.tiny import run_values
from tiltflow import cli
from tiltflow.commands.evaluator import training_rewards
from tiltflow.errors import DataError
from tiltflow.evaluation import EvaluationResult, EvaluationRow, HackingWatch, held_out, summarise
from tiltflow.evaluation.statistics import paired_score
from tiltflow.evaluation.watch import alarm_limit
from tiltflow.rewards import RewardArguments
from tiltflow.runtime.tracking import read_jsonl


def result(level: float | None, *, name: str = "hps", prompts: int = 8) -> EvaluationResult:
    """Return an evaluation whose held-out scores lie around a level, a little different for each prompt."""
    rows = [
        EvaluationRow(f"prompt {g}", s, g, {name: None if level is None else level + 0.01 * g + 0.001 * s})
        for g in range(prompts)
        for s in (0, 1)
    ]
    return EvaluationResult(name, {}, summarise(rows), rows)


def watch(*levels: float | None, after: Sequence[float] | None = None, patience: int | None = None) -> HackingWatch:
    """Return a watch that has seen evaluations of some levels while the training reward rose, or went as told."""
    found = HackingWatch(["hps"], evaluations=10, patience=patience)
    for level, training in zip(levels, after or range(len(levels)), strict=True):
        found.observe(result(level), {"pick": float(training)})
    return found


def test_a_fall_beside_a_rise_is_a_sign() -> None:
    found = watch(0.5)
    (sign,) = found.observe(result(0.4), {"pick": 0.5})
    assert (sign.held_out, sign.training) == ("hps", "pick")
    assert (sign.fall, sign.rise) == (pytest.approx(-0.1), pytest.approx(0.5))
    assert sign.score < -10
    assert str(sign) == ("held-out reward 'hps' fell by 0.1 since 'hps' while the training reward 'pick' rose by 0.5")


@pytest.mark.parametrize(
    ("later", "after"),
    [(0.5, {"pick": 1.5}), (0.6, {"pick": 1.5}), (0.4, {"pick": 0.0}), (0.4, {"pick": -0.5}), (0.4, {})],
)
def test_no_fall_or_no_rise_is_none(later: float, after: dict[str, float]) -> None:
    assert watch(0.5).observe(result(later), after) == []


def test_beside_a_reward_that_compares_within_groups_a_fall_alone_is_a_sign() -> None:
    found = HackingWatch(["hps"], evaluations=10, patience=2, relative=["rank"])
    assert found.observe(result(0.5), {"pick": 1.0}) == []
    assert found.observe(result(0.6), {"pick": 0.9}) == []
    (sign,) = found.observe(result(0.55), {"pick": 0.8})
    assert (sign.training, sign.rise) == ("rank", None)
    assert str(sign) == (
        "held-out reward 'hps' fell by 0.05 since 'hps' while 'rank' was trained on, which only compares the images of "
        "a prompt with each other: its mean does not tell whether it rose"
    )
    (sign,) = found.observe(result(0.5), {"pick": 1.5})
    assert (sign.training, sign.rise) == ("pick", pytest.approx(0.6)) and found.should_stop


def test_a_fall_within_the_noise_is_none() -> None:
    later = result(0.5)
    for row in later.rows:
        row.scores["hps"] += 0.05 if row.group % 2 else -0.06  # type: ignore[index,operator]
    assert watch(0.5).observe(later, {"pick": 1.5}) == []


def test_evaluations_of_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="not of the same prompts"):
        watch(0.5).observe(result(0.4, prompts=7), {"pick": 1.0})


def test_it_compares_with_the_best_evaluation_and_loses_its_patience() -> None:
    found = HackingWatch(["hps"], evaluations=10, patience=2)
    for level, reward, streak in ((0.5, 1.0, 0), (0.52, 1.2, 0), (0.50, 1.4, 1), (0.53, 1.5, 0), (0.4, 1.6, 1)):
        found.observe(result(level), {"pick": reward})
        assert (found.streak, found.should_stop) == (streak, False)
    # falling no further, but still below the best one
    assert found.observe(result(0.45), {"pick": 1.7})
    assert (found.streak, found.should_stop) == (2, True)


def test_without_patience_it_only_warns() -> None:
    found = watch(0.5, 0.4, 0.3, 0.2)
    assert (found.streak, found.should_stop) == (3, False)


def test_each_held_out_reward_has_its_own_best() -> None:
    """One stood best at first, the other later: both falls are told, each since its own best."""
    found = HackingWatch(["a", "b"], evaluations=5, patience=None)

    def both(a: float, b: float, name: str) -> EvaluationResult:
        rows = [
            replace(row, scores={"a": a + row.scores["hps"], "b": b + row.scores["hps"]})  # type: ignore[operator]
            for row in result(0.0).rows
        ]
        return EvaluationResult(name, {}, {}, rows)

    assert found.observe(both(0.5, 0.1, "first"), {"pick": 0.0}) == []
    assert [sign.held_out for sign in found.observe(both(0.4, 0.5, "second"), {"pick": 1.0})] == ["a"]
    signs = found.observe(both(0.4, 0.3, "third"), {"pick": 2.0})
    assert [(sign.held_out, sign.since, sign.rise) for sign in signs] == [("a", "first", 2.0), ("b", "second", 1.0)]


def test_a_reward_without_values_is_mute_and_no_fall() -> None:
    found = watch(0.5)
    assert found.observe(result(None), {"pick": 1.0}) == []
    assert found.mute == ["hps"] and found.streak == 0
    assert found.observe(result(0.4), {"pick": 2.0}) and found.mute == []
    found.observe(result(0.5, prompts=1), {"pick": 2.0})
    assert found.mute == ["hps"]  # one prompt tells nothing about others


def test_kept_evaluations_hold_no_pictures() -> None:
    found = HackingWatch(["hps"], evaluations=3, patience=None)
    found.observe(replace(result(0.5), pictures={"a.png": Image.new("RGB", (2, 2))}), {})
    assert all(not kept.pictures for kept, _ in found._best.values())


# Many comparisons

PROMPTS, EVALUATIONS = 64, 40
CHANCE = math.sqrt(2 / PROMPTS)  # standard error of the difference of two evaluations whose images have the noise 1


def told(scores: NDArray[np.float64], *, patience: int) -> tuple[int, int | None]:
    """Return how many evaluations `[E + 1, prompts]` were warned of, and which of them would end the run."""
    found = HackingWatch(["hps"], evaluations=len(scores) - 1, patience=patience)
    warnings, end = 0, None
    for number, values in enumerate(scores):
        rows = [EvaluationRow("", 0, group, {"hps": value}) for group, value in enumerate(values.tolist())]
        warnings += bool(found.observe(EvaluationResult(str(number), {}, {}, rows), {"pick": float(number)}))
        end = number if end is None and found.should_stop else end
    return warnings, end


def noise(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((EVALUATIONS + 1, PROMPTS))


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_fall_stops_the_run(seed: int) -> None:
    """Six standard errors over forty evaluations: none of them shows a fall beside its neighbour."""
    fall = np.linspace(0, 6 * CHANCE, EVALUATIONS + 1)[:, None]
    warnings, end = told(noise(seed) - fall, patience=3)
    assert end is not None and end < EVALUATIONS and warnings >= 3


def test_a_run_in_which_nothing_falls_is_seldom_warned() -> None:
    """Flat noise: a warning in 5 of 100 runs at most, two in a row in 1 (of 1,000 runs: 29 and 1)."""
    outcomes = [told(noise(seed), patience=2) for seed in range(100)]
    assert sum(warnings > 0 for warnings, _ in outcomes) <= 5
    assert sum(end is not None for _, end in outcomes) <= 1


def test_the_bar_is_that_of_all_pairs() -> None:
    assert alarm_limit(1, 1) == pytest.approx(1.6449, abs=1e-4)  # one pair, one side: 5%
    assert alarm_limit(1, 40) == pytest.approx(3.842, abs=1e-3)  # 820 pairs
    assert alarm_limit(2, 40) > alarm_limit(1, 40) > alarm_limit(1, 10)


@pytest.mark.parametrize(
    ("t", "prompts", "z"),
    # two-sided 5%, 1% and 0.1% points of Student's t, and of the normal distribution
    [(2.5706, 6, 1.9600), (4.0321, 6, 2.5758), (6.8688, 6, 3.2905), (2.2622, 10, 1.9600), (3.3905, 64, 3.2331)],
)
def test_few_prompts_count_for_few(t: float, prompts: int, z: float) -> None:
    values = np.linspace(-1, 1, prompts)
    values = values - values.mean()
    changes = t * values.std(ddof=1) / math.sqrt(prompts) - values
    mean, score = paired_score(changes, range(prompts))
    assert mean == pytest.approx(changes.mean()) and score == pytest.approx(z, rel=0.01)
    assert paired_score(-changes, range(prompts))[1] == pytest.approx(-score)


def test_images_of_one_prompt_are_one_witness() -> None:
    changes = [0.1, 0.3, -0.2, 0.5]
    twice = paired_score([*changes, *changes], [0, 1, 2, 3, 0, 1, 2, 3])
    assert twice == pytest.approx(paired_score(changes, [0, 1, 2, 3]))
    assert paired_score([0.0, 0.0], [0, 1]) == (0.0, 0.0)
    assert paired_score([-0.5, -0.5], [0, 1]) == (-0.5, -math.inf)
    assert math.isnan(paired_score([1.0], [0])[1]) and math.isnan(paired_score([math.nan], [0])[0])


# Who is a witness


def entry(name: str, reward_model: str = "PickScore", **values: Any) -> RewardArguments:
    return RewardArguments(name=name, reward_model=reward_model, **values)


def test_rewards_are_known_by_what_they_are_and_not_by_their_names() -> None:
    trained = [entry("a"), entry("b", "CLIP", weight=0.0)]
    measured = [
        entry("renamed"),  # is `a`
        entry("a", "HPSv2"),  # only called so
        entry("b", "CLIP"),  # of weight 0: watched, not trained on
        entry("c", options={"model_name_or_path": "another"}),
    ]
    assert held_out(measured, trained) == ["a", "b", "c"]


def test_a_reward_on_another_scale_or_as_ranks_is_no_witness() -> None:
    measured = [
        entry("scaled", options={"divisor": 1.0}),
        entry("default", options={"divisor": 26}),
        entry("rough", dtype="bfloat16", device="cpu"),
        entry("path", "tiltflow.rewards.clip_rewards.PickScoreReward"),
        entry("rank", "PickScore_Rank"),
    ]
    assert held_out(measured, [entry("trained")]) == held_out(measured, [entry("trained", "PickScore_Rank")]) == []
    assert held_out([entry("a", "CLIP", options={"scale": "logits"})], [entry("b", "CLIP")]) == []
    assert held_out([entry("a", "OCR", options={"workers": 1})], [entry("b", "OCR")]) == []  # the same, run otherwise
    judge = {"api_key": "***", "top_logprobs": 20}  # as a saved config shows it, and a default
    assert held_out([entry("a", "vllm_evaluate", options=judge)], [entry("b", "vllm_evaluate")]) == []
    far = {"server_url": "http://a", "required_fields": ["image"]}
    others = [entry("a", "RemotePointwiseRewardModel", options={**far, "server_url": "http://b"})]
    assert held_out(others, [entry("b", "RemotePointwiseRewardModel", options=far)]) == ["a"]
    language = entry("a", "LanguageReward", options={"model": "m"})
    scaled = entry("b", "LanguageReward", options={"model": "m", "mean": 0.5, "std": 2})
    other = entry("c", "LanguageReward", options={"model": "n"})
    assert held_out([scaled, other], [language]) == ["c"]
    assert held_out([entry("a", "gone.Mine"), entry("b", "gone.Other")], [entry("c", "gone.Mine")]) == ["b"]


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
    # the evaluation before training is the first to compare with
    assert [line.split(":")[1].strip() for line in told] == ["epoch 2", "epoch 4"]
    assert "held-out reward 'held' fell by 1 since 'before' while the training reward 'trained' rose by 0." in told[0]
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert max(row["step"] for row in rows if "loss" in row) == 4
    assert (tmp_path / "out" / "latest").resolve().name == "epoch_000004"
    assert EvaluationResult.load(tmp_path / "out" / "evaluations" / "after.json").settings["epoch"] == 4
    manifest = tmp_path / "out" / "epoch_000004" / "manifest.json"
    written = manifest.stat().st_ino, manifest.stat().st_mtime_ns
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert max(row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 4
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == written


def test_a_run_that_is_trained_on_ranks_is_stopped_by_the_fall_alone(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(
        random_sd3,
        tmp_path / "out",
        train={"epochs": 20, "evaluate_every": 2, "early_stop": 2, "save_every": 50},
        rewards=[{"name": "rank", "reward_model": "tests.rewards_for_tests.Rank"}],
        eval_rewards=[{"name": "held", "reward_model": "tests.rewards_for_tests.Falling"}],
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    # the evaluation before training is the first to compare with
    assert [line.split(":")[1].strip() for line in told] == ["epoch 2", "epoch 4"]
    assert "held-out reward 'held' fell by 1 since 'before' while 'rank' was trained on" in told[0]
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert max(row["step"] for row in rows if "loss" in row) == 4


def test_a_held_out_reward_without_values_is_told_once(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(
        random_sd3,
        tmp_path / "out",
        train={"epochs": 4, "evaluate_every": 1, "save_every": 50},
        eval_rewards=[{"name": "held", "reward_model": "tests.rewards_for_tests.AllNaN", "on_error": "mask"}],
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    failed = "reward 'held' failed on 6 of 6 images; first reason: not finite: the reward is NaN or infinite"
    names = ["before", *(f"epoch_{epoch:06d}" for epoch in (1, 2, 3)), "after"]
    assert [line for line in told if "failed on" in line] == [
        f"warning: evaluation '{name}': {failed}" for name in names
    ]
    assert [line for line in told if "failed on" not in line] == [
        "warning: epoch 1: held-out reward 'held' has no values to compare (not finite: the reward is NaN or "
        "infinite), so it cannot tell reward hacking; mend it"
    ]


@pytest.mark.parametrize("evaluated", [None, {"name": "other"}, {"name": "other", "dtype": "bfloat16"}])
def test_early_stop_needs_something_to_watch(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: dict[str, Any] | None
) -> None:
    values = run_values(random_sd3, tmp_path / "out", train={"early_stop": 2})
    if evaluated is not None:
        values["train"]["evaluate_every"] = 1
        values["eval_rewards"] = [{**values["rewards"][0], **evaluated}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "train.early_stop=2 compares evaluations of held-out rewards" in capsys.readouterr().err
