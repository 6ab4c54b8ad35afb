"""The trainer on a linear model, against sums that can be written down."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.reward_training.linear import LinearRewardModel, VectorPairs
from tiltflow.errors import CheckpointError, ConfigError, DataError, TrainingError
from tiltflow.reward_training.base import Batch, Fitting
from tiltflow.reward_training.fit_config import FitConfig, KeepBestConfig, check_schedule, learning_rate
from tiltflow.reward_training.trainer import RewardTrainer
from tiltflow.runtime.checkpoint import load_tensors
from tiltflow.runtime.distributed import Distributed


def make(
    *,
    model: LinearRewardModel | None = None,
    train: VectorPairs | None = None,
    sets: dict[str, VectorPairs] | None = None,
    seed: int = 0,
    **options: Any,
) -> RewardTrainer:
    torch.manual_seed(0)
    fitting = Fitting(
        model or LinearRewardModel(hidden=6), train or VectorPairs(45, seed=1), {"all": VectorPairs(21, seed=2)}
    )
    if sets is not None:
        fitting = Fitting(fitting.model, fitting.train, sets)
    config = FitConfig.model_validate({"batch_size": 8, "lr": 0.05, "max_epochs": 2, "workers": 0, **options})
    return RewardTrainer(fitting, config, seed=seed, distributed=Distributed())


def weights_of(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def metrics_of(trainer: RewardTrainer) -> list[dict[str, float]]:
    return [{k: v for k, v in step.metrics.items() if not k.endswith("seconds")} for step in trainer.run()]


def save(trainer: RewardTrainer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    trainer.save(folder, trainer.state())
    return folder


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"max_tokens": 9}])
def test_a_step_descends_the_weighted_mean_whatever_its_micro_batches(options: dict[str, Any]) -> None:
    data = VectorPairs(7, seed=1)
    model = LinearRewardModel()
    start = model.score[-1].weight.detach().clone()
    trainer = make(
        model=model, train=data, max_epochs=1, lr=0.05, weight_decay=0.1, max_grad_norm=0.1, warmup_steps=0, **options
    )
    (step,) = trainer.run()

    weight = start.clone().requires_grad_(True)
    margins = (data.vectors @ weight[0])[:, 0] - (data.vectors @ weight[0])[:, 1]
    loss = -(F.logsigmoid(margins) * data.weights).sum() / data.weights.sum()
    loss.backward()
    assert weight.grad is not None
    norm = weight.grad.norm().item()
    optimizer = torch.optim.AdamW([weight], lr=0.05, betas=(0.9, 0.999), weight_decay=0.1)
    weight.grad.mul_(0.1 / norm)
    optimizer.step()
    torch.testing.assert_close(model.score[-1].weight, weight, rtol=0, atol=1e-6)
    assert step.metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert step.metrics["grad_norm"] == pytest.approx(norm, abs=1e-6)
    assert (step.metrics["samples"], step.metrics["epoch"], step.metrics["lr"]) == (7, 1, 0.05)


def test_a_batch_in_which_nothing_counts_moves_nothing() -> None:
    data = VectorPairs(16, seed=1)
    data.weights[8:] = 0
    trainer = make(train=data, shuffle=False, max_epochs=1)
    run = trainer.run()
    assert next(run).metrics["train/loss"] > 0
    before = weights_of(trainer)
    metrics = next(run).metrics
    assert math.isnan(metrics["train/loss"]) and math.isnan(metrics["grad_norm"]) and metrics["samples"] == 16
    assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "the loss"), (1e38, "the gradient")])
def test_a_number_that_is_not_finite_names_the_step_and_steps_nothing(value: float, what: str) -> None:
    data = VectorPairs(24, seed=1)
    data.vectors[17] = value if math.isnan(value) else torch.tensor([[value] * 4, [-value] * 4])
    trainer = make(model=LinearRewardModel(), train=data, shuffle=False)
    with torch.no_grad():
        trainer.model.score[-1].weight.fill_(-0.1)  # pyright: ignore
    run = trainer.run()
    next(run), next(run)
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match=rf"step 3: {what} is NaN or infinite; nothing was updated"):
        next(run)
    assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
    assert trainer.step == 2 and all(parameter.grad is None for parameter in trainer.model.parameters())


def test_only_matrices_decay() -> None:
    groups = make()._parallel.optimizer.param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.01, {2}), (0.0, {1})]
    frozen = LinearRewardModel()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="every weight of the model is frozen"):
        make(model=frozen)


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    class Watched(LinearRewardModel):
        def forward(self, batch: Batch) -> Any:
            seen.append(self.score[-1](batch["vectors"]).dtype)
            return super().forward(batch)

    seen: list[torch.dtype] = []
    torch.manual_seed(0)
    trainer = make(model=Watched(), precision="bf16", max_steps=2, validate_every=1)
    first, second = trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in weights_of(trainer).values()} == {torch.float32}
    torch.manual_seed(0)
    exact = next(make(model=LinearRewardModel(), max_steps=2).run()).metrics["train/loss"]
    assert 0 < abs(first.metrics["train/loss"] - exact) < 0.02 and second.metrics["train/loss"] > 0


def test_gradient_checkpointing_is_asked_of_the_model() -> None:
    with pytest.raises(ConfigError, match=r"train.gradient_checkpointing=true: LinearRewardModel cannot"):
        make(gradient_checkpointing=True)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_run_has_its_steps_and_validations() -> None:
    trainer = make(validate_every=0.5, validate_at_start=True, max_epochs=None, max_steps=8)
    steps = list(trainer.run())
    assert [step.number for step in steps] == list(range(9))
    assert [step.number for step in steps if step.validated] == [0, 3, 6, 8]
    assert [step.number for step in steps if "validation/loss" in step.metrics] == [0, 3, 6, 8]
    assert [step.last for step in steps] == [False] * 8 + [True]
    assert [step.metrics["samples"] for step in steps[1:]] == [8, 16, 24, 32, 40, 45, 53, 61]
    assert steps[6].metrics["epoch"] == 1
    assert steps[8].metrics["validation/loss"] < steps[0].metrics["validation/loss"]
    assert trainer.model.modes == ["validation", "done"] * 4 and trainer.model.training  # pyright: ignore


def test_validation_is_exact_with_a_last_batch_that_is_not_full() -> None:
    sets = {"near": VectorPairs(21, seed=2), "far": VectorPairs(3, seed=3)}
    trainer = make(sets=sets, micro_batch_size=3)
    found = trainer.validate()
    for name, data in sets.items():
        _, totals = trainer.model(data.batch(range(len(data)), [1.0] * len(data)))
        for key, value in trainer.model.metrics(totals).items():
            assert found[f"validation_{name}/{key}"] == pytest.approx(value, abs=1e-6)
    assert found.keys() == {f"validation_{n}/{k}" for n in sets for k in ("loss", "acc")} | {"validation_seconds"}


def test_a_limited_validation_sees_the_same_examples_each_time() -> None:
    class Recording(VectorPairs):
        def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
            seen.append(sorted(places))
            return super().batch(places, weights)

    seen: list[list[int]] = []
    trainer = make(sets={"all": Recording(40, seed=2)}, limit_validation_batches=2)
    trainer.validate(), trainer.validate()
    assert sorted(seen[:2]) == sorted(seen[2:])
    assert len({place for places in seen for place in places}) == 16


def test_time_ends_a_run_after_a_validation() -> None:
    steps = make(max_seconds=2.0, max_epochs=50).run()
    assert not next(steps).last
    time.sleep(2.0)
    (step,) = steps
    assert step.last and "validation/loss" in step.metrics


def test_micro_batches_change_nothing_but_rounding() -> None:
    expected = metrics_of(make())
    for options in ({"micro_batch_size": 3}, {"max_tokens": 8}, {"micro_batch_size": 2, "workers": 3, "prefetch": 2}):
        for one, other in zip(metrics_of(make(**options)), expected, strict=True):
            assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_cannot_be_read_is_the_error_of_its_step(workers: int) -> None:
    trainer = make(train=VectorPairs(45, seed=1, bad=30), shuffle=False, length_window=0, workers=workers)
    numbers = []
    with pytest.raises(DataError, match="example 30 cannot be read"):
        for step in trainer.run():
            numbers.append(step.number)
    assert numbers == [1, 2, 3]


def test_reading_ahead_stays_within_its_limit() -> None:
    class Counting(VectorPairs):
        def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
            asked.append(len(places))
            return super().batch(places, weights)

    asked: list[int] = []
    run = make(train=Counting(80, seed=1), micro_batch_size=4, workers=2, prefetch=3).run()
    next(run)
    end = time.monotonic() + 20
    while len(asked) < 2 + 4:  # the step's own two micro-batches, and two steps that hold the next three
        assert time.monotonic() < end
        time.sleep(0.005)
    time.sleep(0.1)
    assert len(asked) == 2 + 4
    run.close()  # pyright: ignore


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_a_resumed_run_ends_bit_equal_to_one_that_never_stopped(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 3, "validate_every": 4, "micro_batch_size": 3}

    def fresh() -> RewardTrainer:
        torch.manual_seed(0)
        return make(model=LinearRewardModel(dropout=0.3, hidden=6), **options)

    whole = fresh()
    expected = metrics_of(whole)
    broken = fresh()
    for step in broken.run():
        if step.number == stop:
            break
    checkpoint = save(broken, tmp_path / "checkpoint")
    resumed = fresh()
    resumed.load(checkpoint)
    torch.manual_seed(99)
    assert metrics_of(resumed) == expected[stop:]
    theirs = weights_of(resumed)
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(whole).items())
    assert [step.number for step in resumed.run()] == []


def test_a_checkpoint_holds_no_frozen_weight_and_fits_its_model_alone(tmp_path: Path) -> None:
    checkpoint = save(make(), tmp_path / "checkpoint")
    assert set(load_tensors(checkpoint / "weights.safetensors")) == {
        "score.1.weight",
        "score.1.bias",
        "score.3.weight",
    }
    with pytest.raises(CheckpointError, match=r"of another model: score.1.bias is only in the checkpoint; keep"):
        make(model=LinearRewardModel()).load(checkpoint)
    with pytest.raises(CheckpointError, match="of another model"):
        make(model=LinearRewardModel(hidden=7)).load(checkpoint)
    with pytest.raises(ConfigError, match="seed=0, the config says seed=5"):
        make(seed=5).load(checkpoint)


def test_the_config_decides_on_the_optimizers_options(tmp_path: Path) -> None:
    trainer = make(max_steps=3)
    for _ in trainer.run():
        pass
    checkpoint = save(trainer, tmp_path / "checkpoint")
    resumed = make(max_steps=5, weight_decay=0.5, schedule="constant", lr=0.002)
    resumed.load(checkpoint)
    assert resumed._parallel.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert [step.metrics["lr"] for step in resumed.run()] == [0.002, 0.002]


# --- config -----------------------------------------------------------------------------------------------------------


def test_learning_rates() -> None:
    def rates(total: int, **options: Any) -> list[float]:
        config = FitConfig(lr=1.0, **options)
        return [round(learning_rate(config, step, total), 6) for step in range(total)]

    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(6, schedule="linear", warmup_steps=2) == [0.333333, 0.666667, 1.0, 0.75, 0.5, 0.25]
    assert rates(6, schedule="linear", warmup_steps=1, constant_steps=3, min_lr=0.2) == [0.5, 1.0, 0.6, 0.2, 0.2, 0.2]
    assert rates(5, schedule="cosine", constant_steps=1, min_lr=0.5) == [1.0, 0.926777, 0.75, 0.573223, 0.5]
    assert rates(4, schedule="constant", warmup_steps=1) == [0.5, 1.0, 1.0, 1.0]


def test_a_schedule_needs_steps() -> None:
    config = FitConfig(schedule="cosine", warmup_steps=10, constant_steps=1000)
    check_schedule(config, 1011)
    with pytest.raises(ConfigError, match=r"warmup_steps=10 and train.constant_steps=1000 leave none of 1010 steps"):
        check_schedule(config, 1010)
    check_schedule(FitConfig(schedule="constant", warmup_steps=10), 5)
    open_end = FitConfig(schedule="cosine", warmup_steps=1, constant_steps=None, lr=1.0, min_lr=0.5)
    assert [open_end.last_steps(total) for total in (9, 20, 9_999, 10_000, 10**6)] == [0, 2, 999, 1000, 1000]
    assert [learning_rate(open_end, step, 20) == 0.5 for step in range(16, 20)] == [False, False, True, True]
    for total in range(3, 1012):  # runs shorter than 1,000 steps are no mistake
        check_schedule(open_end, total)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_epochs": None}, "give at least one"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "above lr"),
        ({"validate_every": 1.5}, "less than or equal to 1"),
        ({"validate_every": 0}, "greater than or equal to 1"),
        ({"keep_best": {"mode": "best"}}, "'min' or 'max'"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FitConfig.model_validate(options)


def test_limits_and_intervals() -> None:
    assert FitConfig(max_steps=7, max_epochs=2).total_steps(5) == 7
    assert FitConfig(max_steps=70, max_epochs=2).total_steps(5) == 10
    assert FitConfig(validate_every=0.25).validation_interval(10) == 2
    assert FitConfig(validate_every=1.0).validation_interval(10) == 10
    assert FitConfig(validate_every=1).validation_interval(10) == 1
    assert FitConfig().validation_interval(10) is None
    assert KeepBestConfig().metric == "validation/loss"


# --- the interface of one batch ---------------------------------------------------------------------------------------


def test_loss_and_metrics_of_one_batch() -> None:
    torch.manual_seed(0)
    model, data = LinearRewardModel(), VectorPairs(6, seed=4)
    batch = data.batch(range(6), [1, 1, 1, 1, 1, 0])
    model.prepare_for_validation_step()
    loss, metrics = model.get_loss_and_metrics(batch)
    model.finish_validation_step()
    total, sums = model(batch)
    assert loss.item() == pytest.approx(total.item() / 9, abs=1e-6) and sums["weight"] == 9
    assert metrics == {"loss": pytest.approx(loss.item()), "acc": sums["right"] / 9}
    assert not loss.requires_grad and model.score[-1].weight.grad is None
    model.prepare_for_training_step()
    again, _ = model.get_loss_and_metrics(batch, forward_only=False)
    (total / 9).backward()
    gradient = model.score[-1].weight.grad
    assert gradient is not None and again.item() == loss.item()
    both = gradient.clone()
    model.zero_grad()
    (model(batch)[0] / 9).backward()
    torch.testing.assert_close(both, 2 * model.score[-1].weight.grad)  # added to what was there
    nothing, empty = model.get_loss_and_metrics(data.batch([0], [0]), forward_only=False)
    assert math.isnan(nothing) and math.isnan(empty["loss"])
