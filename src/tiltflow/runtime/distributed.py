"""One process or many: ranks, shares of an epoch, sums over ranks, and failures that no rank waits for."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from tiltflow.errors import GeometryError, TiltflowError

T = TypeVar("T")
BUCKET = 25_000_000  # elements of a gradient message


class Distributed:
    """The process group as the trainer needs it; every method is a no-op or identity in a single process."""

    def __init__(self, *, timeout_seconds: int = 1800):
        """Join the group that `torchrun` or `accelerate launch` has set up, if any."""
        # With FSDP the launcher asks transformers to load weights on the first process alone and leave the others with
        # none; models here are made whole on every process. Must be known before the first one is loaded.
        if "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        patience = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))
        self.accelerator = Accelerator(kwargs_handlers=[patience], cpu=not torch.cuda.is_available())
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's contiguous share of items whose number the world size divides."""
        size = len(items) // self.world_size
        return items[self.rank * size : (self.rank + 1) * size]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over ranks; the argument is left alone."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, a missing one counting as zero; a bucket is one message."""
        if self.world_size == 1:
            return
        bucket: list[nn.Parameter] = []
        for index, parameter in enumerate(parameters):
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) >= BUCKET or index == len(parameters) - 1:
                gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                dist.all_reduce(flat)
                pieces = flat.split([gradient.numel() for gradient in gradients])
                for each, gradient, piece in zip(bucket, gradients, pieces, strict=True):
                    each.grad = gradient.copy_(piece.view_as(gradient))
                bucket = []

    def gather(self, item: T) -> list[T]:
        """Return every rank's object, in rank order."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks when one of them failed, so that none waits for a dead one.

        Raises:
            Exception: This rank's own error; on the others a TiltflowError if the failing rank has one, which is
                the user's to mend, or else a RuntimeError, that tells which rank failed and why.
        """
        told = None if error is None else (isinstance(error, TiltflowError), f"{type(error).__name__}: {error}")
        answers = self.gather(told)
        if error is not None:
            raise error
        for rank, answer in enumerate(answers):
            if answer is not None:
                users, message = answer
                raise (TiltflowError if users else RuntimeError)(f"rank {rank} failed: {message}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on all ranks, wait for each other, and raise everywhere what one of them raised."""
        error: Exception | None = None
        try:
            yield
        except Exception as failure:  # raised again below, on every rank
            error = failure
        self.agree(error)

    def close(self) -> None:
        """Leave the process group; models that accelerate has prepared should be out of use by then.

        They keep the group and its threads alive: a thread that still lets go of its last message while the interpreter
        ends, or that a dying model waits for, aborts or hangs the process. So accelerate's own references to them go
        first; the group's threads then end here.
        """
        if self.world_size > 1:
            self.accelerator.free_memory()
            gc.collect()  # a model that DDP has wrapped refers to itself
            dist.destroy_process_group()


def check_divisible(name: str, value: int, divisor: int, *, why: str) -> None:
    """Check an epoch size.

    Raises:
        GeometryError: `divisor` does not divide `value`; names the two nearest legal values.
    """
    if value > 0 and value % divisor == 0:
        return
    below = max(0, value // divisor * divisor)
    above = below + divisor
    legal = f"{below} or {above}" if below > 0 else f"{above} or {above + divisor}"
    raise GeometryError(f"{name}={value} must be a positive multiple of {divisor} ({why}); nearest legal: {legal}")
