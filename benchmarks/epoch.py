"""How much of an epoch is not the network: one JSON line.

    python -m benchmarks.epoch [--config shapes_ram] [--repeats 3] [--key value ...]

An epoch of the config is run, stage by stage, and after it, in the same process, the bare transformer and VAE calls
that it needed: the same number, batch sizes and arithmetic, with nothing around them. `overhead` is the median over
repeats of an epoch's time over that of the bare calls right after it; `overheads` has them all, which tells how quiet
the machine was.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

from tiltflow.cli import QUIET

os.environ.update(QUIET)

import torch

from tiltflow.commands import build_trainer
from tiltflow.config import load_run_config
from tiltflow.runtime.distributed import Distributed
from tiltflow.training.trainer import Trainer


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def bare_epoch(trainer: Trainer) -> Callable[[], None]:
    """Return a function that makes an epoch's transformer and VAE calls and nothing else."""
    policy, train, sampler = trainer.policy, trainer.config, trainer.sampler
    samples = train.num_prompts_per_epoch * train.group_size
    guided = 2 if sampler.guidance_scale != 1.0 else 1
    rollout_sizes = [min(sampler.batch_size, samples - start) for start in range(0, samples, sampler.batch_size)]
    per_group = train.group_size * trainer.algorithm.config.num_noisings
    group_sizes = [min(train.batch_size, per_group - start) for start in range(0, per_group, train.batch_size)]
    update_sizes = group_sizes * train.num_prompts_per_epoch

    def inputs(count: int):
        return (
            torch.randn(count, *policy.latent_shape, device=policy.device),
            torch.rand(count, device=policy.device),
            policy.negative(count),
        )

    prepared = {size: inputs(size) for size in {*update_sizes, *rollout_sizes, *(guided * s for s in rollout_sizes)}}

    def run() -> None:
        with torch.no_grad():
            for size in rollout_sizes:
                for _ in range(sampler.num_steps):
                    policy.velocity(*prepared[guided * size])
                policy.decode(prepared[size][0])
            for size in update_sizes:
                policy.velocity(*prepared[size])
                policy.velocity(*prepared[size])
        for size in update_sizes:
            policy.velocity(*prepared[size]).sum().backward()
        trainer.optimizer.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="shapes_ram")
    parser.add_argument("--repeats", type=int, default=3)
    known, rest = parser.parse_known_args()
    overrides = [(key.removeprefix("--"), value) for key, value in zip(rest[::2], rest[1::2], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        config = load_run_config(known.config, [("output_dir", folder), *overrides])
        trainer = build_trainer(config, Distributed())
    bare = bare_epoch(trainer)
    trainer.run_epoch(1)
    bare()
    epochs, bares = [], []
    for number in range(2, 2 + known.repeats):
        epochs.append(trainer.run_epoch(number).metrics)
        bares.append(seconds(bare))
    stages = {
        f"{name}_seconds": round(statistics.median(row[f"seconds/{name}"] for row in epochs), 3)
        for name in ("rollout", "reward", "update", "epoch")
    }
    bare_seconds = statistics.median(bares)
    ratios = [row["seconds/epoch"] / bare for row, bare in zip(epochs, bares, strict=True)]
    line = {
        "benchmark": "epoch",
        "config": known.config,
        **stages,
        "bare_seconds": round(bare_seconds, 3),
        "overhead": round(statistics.median(ratios), 4),
        "overheads": [round(ratio, 3) for ratio in ratios],
        "repeats": known.repeats,
        "threads": torch.get_num_threads(),
        "device": str(trainer.policy.device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
