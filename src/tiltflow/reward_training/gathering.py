"""Rows of every process in one tensor, with a gradient back to where they came from."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes, in the order of their ranks, and the place of this process's first one.

    The gradient of a row is the sum of the gradients that all processes have for it, so all must run the backward pass.
    Processes may have different numbers of rows.

    Args:
        rows: `[B, ...]`; the same trailing shape everywhere.
    """
    world = group_size()
    if world == 1:
        return rows, 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    gathered: Any = _Gather.apply(rows, sizes)  # of bytes too: what is no float has no gradient
    return gathered, sum(sizes[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """Concatenates over processes; sums the gradient over them and returns the own share."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        most = max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])  # a collective needs one shape everywhere
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: dist.get_rank()])
        return total[start : start + ctx.sizes[dist.get_rank()]], None
