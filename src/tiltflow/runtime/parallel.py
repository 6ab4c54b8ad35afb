"""A model whose gradients, or parts, are shared by several processes: DDP and FSDP2 behind one face."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.runtime.distributed import Distributed

# Frozen weights come from where the model was loaded; a checkpoint of an adapter stays small.
_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
_ALL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ParallelModel:
    """A model and its optimizer, prepared by accelerate for the processes that there are; alone, nothing is wrapped.

    `accelerate launch` decides: DDP by default, FSDP2 with `--use_fsdp --fsdp_version 2`.

    Args:
        model: Moved to the process's device; must be the same on every process.
        optimizer: Over parameters of the model.
        distributed: The processes.
        blocks: Names of the classes of which FSDP2 gathers one module at a time, unless accelerate was told of others;
            the rest of the model is gathered at once.

    Raises:
        ConfigError: accelerate was told to use something else, such as DeepSpeed or the first FSDP.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        distributed: Distributed,
        *,
        blocks: Iterable[str] = (),
    ) -> None:
        accelerator = distributed.accelerator
        kind = accelerator.distributed_type
        known = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP}
        if kind not in known or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
            raise ConfigError(
                f"accelerate was configured for {kind.value}; reward models are trained with DDP (accelerate launch "
                "--multi_gpu) or FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)"
            )
        self.optimizer = optimizer
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self._names = model.state_dict().keys() - frozen
        self._sharded = kind == DistributedType.FSDP
        self._accelerator = accelerator
        # FSDP turns the model's own parameters into shards: an unsharded twin is what can be written for others.
        self._whole = copy.deepcopy(model) if self._sharded and distributed.is_main else None
        if self._sharded:
            _gather_by_block(accelerator.state.fsdp_plugin, model, blocks)
            self.module, _ = accelerator.prepare(model, optimizer)
        elif distributed.world_size > 1:
            self.module = accelerator.prepare_model(model)
        else:
            self.module = model.to(distributed.device)
        # Both kinds average gradients over processes where a sum is wanted.
        self.gradient_scale = float(distributed.world_size)

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context for one backward pass of several; gradients are exchanged in the last one alone."""
        return nullcontext() if last else self._accelerator.no_sync(self.module)

    def clip_gradients(self, limit: float | None) -> float:
        """Scale the gradient down to a norm of at most `limit`, and return the norm it had, over all processes."""
        bound = limit if limit is not None else float("inf")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
        return float(_whole_tensor(norm))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return trained weights and optimizer state under full names; every process calls it, the main one gets it."""
        weights, optimizer = get_state_dict(self.module, self.optimizer, options=_TRAINED)
        return {name: value for name, value in weights.items() if isinstance(value, Tensor)}, dict(optimizer)

    def load_state(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in a run of any number of processes; every process calls it.

        The options of the optimizer, such as its weight decay, stay those of the config.

        Raises:
            CheckpointError: The state is of another model.
        """
        odd = sorted(self._names ^ weights.keys())
        if odd:
            where = "the model" if odd[0] in self._names else "the checkpoint"
            raise CheckpointError(f"the checkpoint is of another model: {odd[0]} is only in {where}")
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            set_state_dict(
                self.module,
                self.optimizer,
                model_state_dict=dict(weights),
                optim_state_dict=dict(optimizer),
                options=_TRAINED,
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint is of another model: {error}") from error
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)

    def whole(self, model: nn.Module) -> nn.Module:
        """Return a model with all weights, for writing; every process calls it, the main one may use it.

        Args:
            model: What was given to the constructor.
        """
        if not self._sharded:
            return model
        weights = get_model_state_dict(self.module, options=_ALL)
        if self._whole is None:
            return model
        self._whole.load_state_dict(weights)
        return self._whole


def _gather_by_block(plugin: Any, model: nn.Module, blocks: Iterable[str]) -> None:
    """Let FSDP2 gather the blocks that the model has one at a time, where the launcher was told nothing about it."""
    present = sorted(set(blocks) & {type(module).__name__ for module in model.modules()})
    if plugin.auto_wrap_policy is None and present:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = present


def _whole_tensor(value: Any) -> Tensor:
    """Return the full value of a tensor that may be spread over processes."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
