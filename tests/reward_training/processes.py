"""One small run and what came of it, on as many processes as it is started on; see test_processes.py.

Arguments: where the results go, and `ddp` or `fsdp`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tests.reward_training.linear import LinearRewardModel, VectorPairs
from tiltflow.errors import TiltflowError
from tiltflow.reward_training.base import Fitting
from tiltflow.reward_training.fit_config import FitConfig
from tiltflow.reward_training.trainer import RewardTrainer
from tiltflow.runtime.distributed import Distributed

CONFIG = FitConfig(
    batch_size=8,
    lr=0.05,
    max_epochs=2,
    micro_batch_size=2,
    validate_every=2,
    max_grad_norm=0.5,
    weight_decay=0.1,
    workers=1,
)


def join(kind: str) -> Distributed:
    """Join the group; accelerate itself turns FSDP on for GPUs only, so the CPU is talked into it here.

    All other settings of FSDP are those that `accelerate launch` has told the process.
    """
    group = Distributed()
    if kind == "fsdp":
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        plugin = FullyShardedDataParallelPlugin()
        group.accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        assert group.accelerator.is_fsdp2
    return group


def command(processes: int, kind: str) -> list[str]:
    """Return how a program is started on so many processes; what follows is `-m`, its module and its arguments."""
    if processes == 1:
        return [sys.executable]
    words = ["--use_fsdp", "--fsdp_version", "2"] if kind == "fsdp" else ["--multi_gpu"]  # which it starts on CPUs too
    rest = [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    return [sys.executable, "-m", "accelerate.commands.launch", *words, *rest, "--main_process_port", "0"]


def units(model: nn.Module) -> list[str]:
    """Return the classes of the modules that FSDP2 gathers one at a time."""
    return [type(module).__mro__[2].__name__ for module in model.modules() if isinstance(module, FSDPModule)]


def trainer(group: Distributed, *, bad: int | None = None) -> RewardTrainer:
    torch.manual_seed(0)
    fitting = Fitting(
        LinearRewardModel(hidden=6),
        VectorPairs(45, seed=1, bad=bad),
        {"near": VectorPairs(21, seed=2), "far": VectorPairs(5, seed=3)},
    )
    return RewardTrainer(fitting, CONFIG, seed=3, distributed=group)


def main(output: Path, kind: str) -> None:
    group = join(kind)
    work(group, output, kind)  # its models are gone before the group is: see Distributed.close
    group.close()


def work(group: Distributed, output: Path, kind: str) -> None:
    """Train, save, resume, fail; write what came of it."""
    run = trainer(group)
    answers: dict[str, Any] = {"steps": [dict(step.metrics) for step in run.run()]}
    run.whole_model().save_pretrained(output / f"rank{group.rank}") if group.is_main else run.whole_model()
    answers["sharded"] = [type(parameter).__name__ for parameter in run.model.score.parameters()]

    # Half of the run, written, read again by new objects, and finished.
    half = trainer(group)
    for step in half.run():
        if step.number == 5:
            break
    state = half.state()
    checkpoint = output / "checkpoint"
    if group.is_main:
        checkpoint.mkdir(parents=True, exist_ok=True)
        half.save(checkpoint, state)
    group.gather(None)
    resumed = trainer(group)
    resumed.load(checkpoint)
    answers["resumed"] = [dict(step.metrics) for step in resumed.run()]

    try:
        list(trainer(group, bad=11).run())
    except TiltflowError as error:
        answers["error"] = str(error)
    if kind == "ddp":
        answers["mean"] = mean_of_a_batch(group)
    (output / f"rank{group.rank}.json").write_text(json.dumps(answers))
    group.gather(None)


def mean_of_a_batch(group: Distributed) -> dict[str, Any]:
    """Return loss, metrics and the summed gradient of six pairs that the processes share."""
    torch.manual_seed(0)
    model = LinearRewardModel()
    share = list(group.share(range(6)))
    batch = VectorPairs(6, seed=4).batch(share, [1.0] * len(share))
    loss, metrics = model.get_loss_and_metrics(batch, forward_only=False)
    (weight,) = model.score.parameters()
    assert weight.grad is not None
    return {"loss": loss.item(), "metrics": metrics, "gradient": group.sum(weight.grad).flatten().tolist()}


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    main(Path(sys.argv[1]), sys.argv[2])
