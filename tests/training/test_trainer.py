"""The training loop on the toy policy: masks, failures, the lagged weights, and what a checkpoint holds."""

import math

import pytest
import torch

from tiltflow.algorithms import RAM, RAMConfig
from tiltflow.data import PromptStream
from tiltflow.errors import ConfigError, GeometryError, RewardError, TrainingError
from tiltflow.rewards import RewardArguments, RewardEngine
from tiltflow.runtime.distributed import Distributed
from tiltflow.testing import ToyPolicy
from tiltflow.training import SamplerConfig, TrainConfig, Trainer
from tiltflow.training.trainer import check_geometry
from tiltflow.types import Prompt


def toy_trainer(reward="tiltflow.testing.LinearReward", *, policy=None, on_error="raise", seed=0, **train):
    options = {"epochs": 3, "num_prompts_per_epoch": 2, "group_size": 8, "batch_size": 16, "lr": 0.05, **train}
    return Trainer(
        policy or ToyPolicy(),
        RAM(RAMConfig(reward_multiplier=0.5, num_noisings=2)),
        RewardEngine([RewardArguments(name="r", reward_model=reward, on_error=on_error, batch_size=4)]),
        PromptStream([Prompt("a"), Prompt("bb"), Prompt("ccc")], seed=seed),
        config=TrainConfig(**options),
        sampler=SamplerConfig(num_steps=4, guidance_scale=1.0, batch_size=16),
        seed=seed,
        distributed=Distributed(),
    )


def test_an_epoch_reports_rewards_loss_drift_and_seconds():
    first, second, _ = (epoch.metrics for epoch in toy_trainer().run())
    assert first["drift"] == 0 and second["drift"] > 0
    assert first["lr"] == 0.05 and first["failures/r"] == 0
    assert first["loss"] > 0 and first["target_scale"] > 0 and first["grad_norm"] > 0
    stages = sum(first[f"seconds/{name}"] for name in ("rollout", "reward", "update"))
    assert 0 < stages <= first["seconds/epoch"]


def test_reward_metrics_are_the_moments_of_the_scores():
    epoch = toy_trainer().run_epoch(1)
    scores = epoch.table.column("r").double()
    assert epoch.metrics["reward/r/mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert epoch.metrics["reward/r/std"] == pytest.approx(scores.std(unbiased=False).item(), abs=1e-6)


def place(policy, *, theta, old, ema):
    """Set the mean of theta and of its snapshots; the reference stays where the policy was made."""
    means = {"theta.mean": theta, "old.mean": old, "ema.mean": ema}
    values = {name: torch.full(policy.latent_shape, value) for name, value in means.items()}
    policy.weights.load_state(policy.weights.state() | values)


def test_rollouts_come_from_old():
    policy = ToyPolicy(mean=0.5)
    place(policy, theta=1.0, old=2.0, ema=4.0)
    found = toy_trainer(policy=policy).run_epoch(1).table.column("r")
    means = {"ref": 0.5, "theta": 1.0, "old": 2.0, "ema": 4.0}
    made = {name: toy_trainer(policy=ToyPolicy(mean=mean)).run_epoch(1) for name, mean in means.items()}
    assert {name: torch.equal(found, epoch.table.column("r")) for name, epoch in made.items()} == {
        "ref": False,
        "theta": False,
        "old": True,
        "ema": False,
    }


def test_the_update_moves_theta_though_the_rollout_used_old():
    policy = ToyPolicy()
    place(policy, theta=1.0, old=2.0, ema=4.0)
    toy_trainer(policy=policy, lr=0.05, weight_decay=0.0).run_epoch(1)
    moved = policy.mean.item() - 1.0
    assert abs(moved) == pytest.approx(0.05, rel=1e-3)  # Adam's first step has the length of the learning rate
    state = policy.weights.state()
    assert state["old.mean"].item() == pytest.approx(0.01 * 2.0 + 0.99 * (1.0 + moved), abs=1e-6)
    assert state["ema.mean"].item() == pytest.approx(0.9 * 4.0 + 0.1 * (1.0 + moved), abs=1e-6)


def test_old_follows_by_the_algorithms_decay_and_ema_by_the_configs():
    policy = ToyPolicy()
    trainer = toy_trainer(policy=policy, ema_decay=0.75)
    before = policy.mean.item()
    trainer.run_epoch(1)
    state = policy.weights.state()
    moved = state["theta.mean"].item() - before
    assert moved != 0
    assert state["old.mean"].item() == pytest.approx(before + 0.99 * moved, abs=1e-7)
    assert state["ema.mean"].item() == pytest.approx(before + 0.25 * moved, abs=1e-7)


def test_masked_samples_leave_the_update_and_are_counted():
    trainer = toy_trainer("tests.rewards_for_tests.NaNForFirst", on_error="mask")
    metrics = trainer.run_epoch(1).metrics
    assert metrics["failures/r"] == 4  # one of every batch of four, sixteen samples
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["reward/r/mean"])


def test_a_masked_sample_changes_nothing_for_the_others():
    """The update with some samples masked equals the update on the others alone, as far as the loss sees it."""
    trainer = toy_trainer("tests.rewards_for_tests.NaNForFirst", on_error="mask")
    with trainer.engine.begin() as scoring:
        samples = trainer._rollout(1, lambda stage: None, scoring.add_batch)
        table = scoring.finish()
    assert samples.images.shape == (0, 3, *samples.images.shape[2:])  # they went to the engine alone
    scored, _ = trainer._advantages(samples, table)
    valid = ~table.scores[:, 0].isnan()
    assert len(scored) == int(valid.sum()) == 12
    torch.testing.assert_close(scored.latents, samples.latents[valid], rtol=0, atol=0)
    pooled = table.scores[valid, 0].double().std(unbiased=False)
    group = table.scores[valid & (samples.groups == samples.groups[0]), 0].double()
    torch.testing.assert_close(scored.advantages[: len(group)], (group - group.mean()) / pooled, rtol=1e-6, atol=1e-9)


def test_too_many_failures_stop_training_and_leave_the_weights_alone():
    policy = ToyPolicy()
    trainer = toy_trainer("tests.rewards_for_tests.AllNaN", on_error="mask", policy=policy)
    with pytest.raises(RewardError, match=r"'r' failed on 100%.*max_failure_fraction.*NaN"):
        trainer.run_epoch(1)
    assert policy.mean.item() == 0 and trainer.epoch == 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [("NaNForFirst", "not finite"), ("OneShort", "3 rewards for 4 samples"), ("Broken", "the judge is out")],
)
def test_a_failing_reward_with_on_error_raise_stops_training(reward, message):
    with pytest.raises(RewardError, match=message):
        toy_trainer(f"tests.rewards_for_tests.{reward}").run_epoch(1)


def test_a_gradient_that_is_not_finite_updates_nothing():
    policy = ToyPolicy()
    trainer = toy_trainer(policy=policy)
    trainer.algorithm.config = RAMConfig(reward_multiplier=1e38, num_noisings=2)
    with pytest.raises(TrainingError, match="gradient is NaN or infinite"):
        trainer.run_epoch(1)
    assert policy.mean.item() == 0


def test_geometry_names_the_nearest_legal_values():
    with pytest.raises(GeometryError, match=r"num_prompts_per_epoch=10 .*multiple of 4.*8 or 12"):
        check_geometry(TrainConfig(num_prompts_per_epoch=10), 4)
    with pytest.raises(GeometryError, match=r"nearest legal: 4 or 8"):
        check_geometry(TrainConfig(num_prompts_per_epoch=3), 4)
    with pytest.raises(ConfigError, match="group_size=1"):
        check_geometry(TrainConfig(group_size=1), 1)
    check_geometry(TrainConfig(num_prompts_per_epoch=12), 4)


def test_saving_and_loading_continues_exactly(tmp_path):
    whole = toy_trainer()
    for _ in whole.run():
        pass
    first = toy_trainer()
    first.run_epoch(1)
    first.save(tmp_path)
    moved = ToyPolicy()
    with torch.no_grad():
        moved.mean.fill_(9.0)
    second = toy_trainer(policy=moved)
    second.load(tmp_path)
    assert second.epoch == 1
    for _ in second.run():
        pass
    assert second.epoch == 3
    expected, found = whole.policy.weights.state(), second.policy.weights.state()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_on_resume_the_config_decides_on_the_options_and_the_checkpoint_on_the_moments(tmp_path):
    first = toy_trainer(lr=0.05)
    first.run_epoch(1)
    first.save(tmp_path)
    second = toy_trainer(lr=0.01, betas=(0.8, 0.95), weight_decay=0.03, adam_eps=1e-6)
    second.load(tmp_path)
    (group,) = second.optimizer.param_groups
    chosen = {name: group[name] for name in ("lr", "betas", "weight_decay", "eps")}
    assert chosen == {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.03, "eps": 1e-6}
    saved, loaded = (trainer.optimizer.state_dict()["state"] for trainer in (first, second))
    assert saved.keys() == loaded.keys() == {0, 1}
    for index, moments in saved.items():
        assert moments["step"] == 1
        assert all(torch.equal(value, loaded[index][name]) for name, value in moments.items())
    assert second.run_epoch(2).metrics["lr"] == 0.01


def test_a_checkpoint_of_another_seed_or_model_is_refused(tmp_path):
    trainer = toy_trainer()
    trainer.run_epoch(1)
    trainer.save(tmp_path)
    with pytest.raises(ConfigError, match="seed=0, the config says seed=1"):
        toy_trainer(seed=1).load(tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        toy_trainer(policy=ToyPolicy(dimensions=3)).load(tmp_path)
