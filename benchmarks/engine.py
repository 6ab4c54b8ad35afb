"""How much of the rewards' latency an epoch waits for: one JSON line.

    python -m benchmarks.engine [--samples 64] [--rollout_batch 8] [--reward_batch 16] [--rollout_seconds 2]

The rollout and two rewards are simulated by sleeping: a rollout of so many seconds, whose batches are submitted as they
come; each call of a reward answers after `--latency` seconds, whatever its batch. Measured are the rollout alone, the
same with both rewards asynchronous (`--lanes` workers each), and with both synchronous.

The last batch is submitted when the rollout ends, so that its answers come a latency later: `floor` is the rollout and
that latency, which no engine can beat, and `tail` how long the table was waited for after the last submission.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tiltflow.rewards import PointwiseRewardModel, RewardArguments, RewardEngine, RewardModelOutput
from tiltflow.types import Prompt, SampleBatch

GROUP_SIZE = 8
SIDE = 512  # pixels


@dataclass(frozen=True)
class Setting:
    """The epoch that is simulated."""

    samples: int
    rollout_batch: int
    reward_batch: int
    rollout_seconds: float
    latency: float
    lanes: int


@dataclass(frozen=True)
class Timed:
    """How long one epoch took, in seconds."""

    rollout: float  # until the last batch was submitted
    total: float

    @property
    def tail(self) -> float:
        return self.total - self.rollout


class SlowReward(PointwiseRewardModel):
    """Answers after a while, as a server does."""

    latency = 0.0

    def __call__(self, prompt: list[str], image: Any = None, **media: Any) -> RewardModelOutput:
        time.sleep(self.latency)
        return RewardModelOutput(torch.zeros(len(prompt)))


def engine(setting: Setting, *, asynchronous: bool) -> RewardEngine:
    """Return an engine with two such rewards."""
    rewards = [
        RewardArguments(
            name=name,
            reward_model=name,
            batch_size=setting.reward_batch,
            device="cpu",
            async_reward=asynchronous,
            num_workers=setting.lanes,
        )
        for name in ("first", "second")
    ]
    slow = type("Slow", (SlowReward,), {"latency": setting.latency})
    return RewardEngine(rewards, factory=slow)


def batches(setting: Setting) -> list[SampleBatch]:
    """Return the rollout's batches, groups of eight in their order."""
    groups = torch.arange(setting.samples) // GROUP_SIZE
    return [
        SampleBatch(
            prompts=[Prompt(f"prompt {group}") for group in part.tolist()],
            groups=part,
            latents=torch.zeros(len(part), 1),
            images=torch.rand(len(part), 3, SIDE, SIDE),
        )
        for part in groups.split(setting.rollout_batch)
    ]


def epoch(setting: Setting, rollout: list[SampleBatch], scorer: RewardEngine | None) -> Timed:
    """Sleep through a rollout, submitting its batches on the way, and wait for the table."""
    began = time.perf_counter()
    pause = setting.rollout_seconds / len(rollout)
    if scorer is None:
        for _ in rollout:
            time.sleep(pause)
        took = time.perf_counter() - began
        return Timed(took, took)
    with scorer.begin(group_size=GROUP_SIZE) as scoring:
        for batch in rollout:
            time.sleep(pause)
            scoring.add_batch(batch)
        submitted = time.perf_counter() - began
        table = scoring.finish()
    total = time.perf_counter() - began
    assert table.failures == () and table.scores.shape == (setting.samples, 2)
    return Timed(submitted, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 64), ("rollout_batch", 8), ("reward_batch", 16), ("lanes", 4), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rollout_seconds", type=float, default=2.0)
    parser.add_argument("--latency", type=float, default=0.5)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    setting = Setting(**options)
    rollout = batches(setting)
    engines = {"alone": None, "async": engine(setting, asynchronous=True), "sync": engine(setting, asynchronous=False)}
    runs: dict[str, list[Timed]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, scorer in engines.items():
            runs[name].append(epoch(setting, rollout, scorer))
    total = {name: statistics.median(run.total for run in found) for name, found in runs.items()}
    line = {
        "benchmark": "engine",
        **asdict(setting),
        "image_side": SIDE,
        "repeats": repeats,
        "rollout_alone": round(total["alone"], 3),
        "floor": round(total["alone"] + setting.latency, 3),
    }
    for name in ("async", "sync"):
        tail = statistics.median(run.tail for run in runs[name])
        line |= {
            f"{name}_total": round(total[name], 3),
            f"{name}_ratio": round(total[name] / total["alone"], 3),
            f"{name}_tail": round(tail, 3),
            f"{name}_before_tail_ratio": round((total[name] - tail) / total["alone"], 3),
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
