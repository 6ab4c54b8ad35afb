"""A model and its optimizer in one process; two processes are tested with the trainer of reward models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.parallel import ParallelModel


class Tied(nn.Module):
    """Two layers of one weight, a frozen one, a scalar and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.read = nn.Linear(3, 5, bias=False)
        self.read.weight = self.embed.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.read(self.frozen(self.embed(index))).square().sum() * self.scale


def make() -> ParallelModel:
    torch.manual_seed(0)
    model = Tied()
    groups = [{"params": [model.embed.weight], "weight_decay": 0.1}, {"params": [model.scale], "weight_decay": 0.0}]
    return ParallelModel(model, torch.optim.AdamW(groups, lr=0.1), Distributed())


def train(parallel: ParallelModel, steps: int) -> None:
    for step in range(steps):
        parallel.module(torch.tensor([step % 5, 1])).backward()
        parallel.optimizer.step()
        parallel.optimizer.zero_grad()


def copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_alone_nothing_is_wrapped_and_a_state_goes_on_bit_for_bit() -> None:
    whole, broken = make(), make()
    assert type(whole.module) is Tied and whole.gradient_scale == 1 and whole.whole(whole.module) is whole.module
    train(whole, 4)
    train(broken, 2)
    weights, optimizer = (copied(part) for part in broken.state())
    assert weights.keys() == {"embed.weight", "read.weight", "scale", "count"}
    resumed = make()
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.5
    resumed.load_state(weights, optimizer)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.5  # the config decides on options
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.1
    for step in (2, 3):
        resumed.module(torch.tensor([step, 1])).backward()
        resumed.optimizer.step()
        resumed.optimizer.zero_grad()
    theirs = resumed.module.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.module.state_dict().items())
    assert resumed.module.read.weight is resumed.module.embed.weight


def test_a_gradient_is_scaled_down_to_its_limit() -> None:
    parallel = make()
    parallel.module(torch.tensor([0, 1])).backward()
    norm = parallel.clip_gradients(None)
    assert norm > 0.1 and parallel.clip_gradients(0.1) == pytest.approx(norm)
    assert parallel.clip_gradients(None) == pytest.approx(0.1, rel=1e-4)
    with parallel.accumulating(last=False), parallel.accumulating(last=True):
        pass


def test_a_state_of_another_model_is_refused() -> None:
    weights, optimizer = make().state()
    with pytest.raises(CheckpointError, match="scale is only in the model"):
        make().load_state({name: value for name, value in weights.items() if name != "scale"}, optimizer)
    with pytest.raises(CheckpointError, match="other is only in the checkpoint"):
        make().load_state({**weights, "other": torch.zeros(1)}, optimizer)
    with pytest.raises(CheckpointError, match="of another model"):
        make().load_state({**weights, "embed.weight": torch.zeros(2, 2)}, optimizer)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.FSDP])
def test_what_accelerate_may_not_be_configured_for(kind: DistributedType) -> None:
    group = Distributed()
    group.accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=False)  # pyright: ignore
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=rf"configured for {kind.value}; .* FSDP2 .*--fsdp_version 2"):
        ParallelModel(model, torch.optim.SGD(model.parameters()), group)
