"""How an epoch is cut into batches or spread over processes does not change what it does."""

import sys

import pytest
import torch

from tests.invariant.runs import final_weights, train, write_config
from tests.tiny import tiny_config
from tiltflow.commands import build_trainer
from tiltflow.runtime.distributed import Distributed


def weights_after(config, epochs=2):
    trainer = build_trainer(config, Distributed())
    for epoch in range(1, epochs + 1):
        trainer.run_epoch(epoch)
    return trainer.policy.weights.state()


def has_moved(state):
    """Tell whether LoRA's second factors, which start at zero, are far from it."""
    return max(value.abs().max().item() for name, value in state.items() if "lora_B" in name) > 1e-3


def test_accumulating_small_batches_equals_one_large_batch(random_sd3, tmp_path):
    small = weights_after(tiny_config(random_sd3, tmp_path, train={"batch_size": 1}, sampler={"batch_size": 3}))
    large = weights_after(tiny_config(random_sd3, tmp_path, train={"batch_size": 64}, sampler={"batch_size": 64}))
    assert has_moved(large)
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reward", ["Brightness", pytest.param("Rank", marks=pytest.mark.slow)])
def test_two_processes_give_the_update_of_one(random_sd3, tmp_path, reward):
    rewards = [{"name": "r", "reward_model": f"tests.rewards_for_tests.{reward}"}]
    options = {"rewards": rewards, "train": {"epochs": 2}}
    one = write_config(tmp_path / "one.yaml", random_sd3, tmp_path / "one", **options)
    two = write_config(tmp_path / "two.yaml", random_sd3, tmp_path / "two", **options)
    train(one)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")
    train(two, launcher=(*torchrun, "-m", "tiltflow"))
    expected, found = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert has_moved(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
