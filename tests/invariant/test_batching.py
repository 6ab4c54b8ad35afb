"""How an epoch is cut into batches or spread over processes does not change what it does."""

import json
import sys

import pytest
import torch

from tests.invariant.runs import final_weights, train, write_config
from tests.tiny import tiny_config
from tiltflow.commands import build_trainer
from tiltflow.evaluation import EvaluationResult
from tiltflow.runtime.distributed import Distributed

# Adam divides by the gradient's size: with its usual tiny epsilon, an entry whose gradient is all rounding moves by
# the full rate in a random direction. A larger one lets the comparison see the gradients themselves.
STEADY = {"adam_eps": 1e-6}


def weights_after(config, epochs=2):
    trainer = build_trainer(config, Distributed())
    for epoch in range(1, epochs + 1):
        trainer.run_epoch(epoch)
    return trainer.policy.weights.state()


def has_moved(state):
    """Tell whether LoRA's second factors, which start at zero, are far from it."""
    return max(value.abs().max().item() for name, value in state.items() if "lora_B" in name) > 1e-3


def test_accumulating_small_batches_equals_one_large_batch(random_sd3, tmp_path):
    small = weights_after(
        tiny_config(random_sd3, tmp_path, train={"batch_size": 1, **STEADY}, sampler={"batch_size": 3})
    )
    large = weights_after(
        tiny_config(random_sd3, tmp_path, train={"batch_size": 64, **STEADY}, sampler={"batch_size": 64})
    )
    assert has_moved(large)
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=0, atol=1e-5)


def both_ways(random_sd3, tmp_path, **options):
    """Run one config in one process and in two; return the final weights of each."""
    configs = [write_config(tmp_path / f"{n}.yaml", random_sd3, tmp_path / n, **options) for n in ("one", "two")]
    train(configs[0])
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train(configs[1], launcher=(*torchrun, "-m", "tiltflow"))
    return final_weights(tmp_path / "one"), final_weights(tmp_path / "two")


@pytest.mark.parametrize("reward", ["Brightness", pytest.param("Rank", marks=pytest.mark.slow)])
def test_two_processes_give_the_update_of_one(random_sd3, tmp_path, reward):
    rewards = [{"name": "r", "reward_model": f"tests.rewards_for_tests.{reward}"}]
    one, two = both_ways(random_sd3, tmp_path, rewards=rewards, train={"epochs": 2, **STEADY})
    assert has_moved(one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    results = [EvaluationResult.load(tmp_path / n / "evaluations" / "after.json") for n in ("one", "two")]
    places = [[(row.group, row.sample, row.image) for row in result.rows] for result in results]
    assert places[0] == places[1] and len(places[0]) == 6
    scores = [torch.tensor([row.scores["r"] for row in result.rows]) for result in results]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-3)
    assert len(list((tmp_path / "two" / "evaluations" / "after").glob("*.png"))) == 2


def test_a_process_without_a_valid_sample_takes_part(random_sd3, tmp_path):
    """Of two prompts one can never be scored: in two processes one has nothing to learn from, in every epoch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a ring\na photo of a star\n")
    rewards = [{"name": "r", "reward_model": "tests.rewards_for_tests.NaNForStars", "on_error": "mask"}]
    one, two = both_ways(
        random_sd3,
        tmp_path,
        rewards=rewards,
        data={"prompts": str(prompts)},
        train={"epochs": 2, "num_prompts_per_epoch": 2, "group_size": 4, **STEADY},
    )
    assert has_moved(one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["failures/r"] for row in rows if "loss" in row] == [4, 4]
