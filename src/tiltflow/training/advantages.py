"""Advantages: how much better a sample's rewards are than those of its prompt's other samples.

Each prompt's samples form a group with an integer id. With rewards r_ik and weights w_k,

    sum   R_i = sum_k w_k r_ik,                           A_i = (R_i - mean_group R) / max(std R, 1e-6)
    gdpo  c_i = sum_k w_k (r_ik - mean_group r_k) / max(std_group r_k, 1e-6),
                                                          A_i = (c_i - mean c) / max(std c, 1e-6)

Standard deviations are of the population (no n - 1). `sum` lets the reward of the largest spread lead; `gdpo` puts
all rewards on one scale before they are weighted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

STD_FLOOR: Final = 1e-6
Reduce = Callable[[Tensor], Tensor]


def group_advantages(
    scores: Tensor,
    groups: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    aggregation: Literal["sum", "gdpo"] = "sum",
    std: Literal["global", "group"] = "global",
    valid: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Turn rewards into advantages relative to each group.

    A row is left out of every mean and std, and gets advantage 0, when one of its rewards of non-zero weight is masked
    or not finite. Groups without spread and groups of fewer than two valid rows get 0 exactly.

    Args:
        scores: Rewards, `[B, R]`; NaN marks a failed one.
        groups: Integer group ids, `[B]`, in any order; a group lies on one rank.
        weights: Weight of each reward, `[R]`; all 1 when absent. A reward of weight 0 takes no part.
        aggregation: "sum" weights raw rewards; "gdpo" first standardises each reward inside its group.
        std: What "sum" divides by: the std of all samples ("global") or of the sample's own group ("group").
            "gdpo" knows "global" only.
        valid: Boolean mask, `[B]` or `[B, R]`; False marks a reward that must not be used.
        reduce: Sums a float64 tensor over all ranks; None in a single process. It is called the same number of times
            on every rank whatever the data, never for `std="group"`.

    Returns:
        Float64 `[B]` on the device of `scores`, without gradient.

    Raises:
        ValueError: If a shape, type or name is wrong.

    Source: "sum" as in Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), whose code adds 1e-4 to the std instead of
    bounding it; "gdpo" as in GDPO (Liu et al. 2026, arXiv 2601.05242). The bound is Flow-Factory's.

    Example:
        >>> scores = torch.tensor([[0.0], [1.0], [5.0], [5.0]])
        >>> group_advantages(scores, torch.tensor([7, 7, 9, 9]), std="group").tolist()
        [-1.0, 1.0, 0.0, 0.0]
    """
    _check_choices(aggregation, std)
    _check_shapes(scores, groups, valid)
    weight = _checked_weights(weights, scores)
    values, usable = scores.detach().double(), torch.isfinite(scores)
    if valid is not None:
        usable = usable & (valid if valid.ndim == 2 else valid[:, None])
    rows = (usable | (weight == 0)).all(1)  # [B]
    values = torch.where(rows[:, None] & (weight != 0), values, 0.0)
    index = torch.unique(groups, return_inverse=True)[1]

    if aggregation == "sum":
        total = _weighted_sum(values, weight)
        local = _group_statistics(total[:, None], rows, index)
        scale = local.std[:, 0] if std == "group" else _pooled_mean_std(total, rows, reduce)[1]
        return local.centred[:, 0] / scale.clamp(min=STD_FLOOR)
    per_reward = _group_statistics(values, rows, index)
    combined = _weighted_sum(per_reward.centred / per_reward.std.clamp(min=STD_FLOOR), weight)
    mean, scale = _pooled_mean_std(combined, rows, reduce)
    flat = _group_statistics(combined[:, None], rows, index).flat[:, 0]
    return torch.where(rows & ~flat, (combined - mean) / scale.clamp(min=STD_FLOOR), 0.0)


@dataclass(frozen=True)
class _GroupStatistics:
    """Per-row view of each row's group, for K columns."""

    centred: Tensor  # [B, K] value - group mean; 0 for invalid rows and flat groups
    std: Tensor  # [B, K] population std of the row's group
    flat: Tensor  # [B, K] the group has fewer than two distinct valid values


def _group_statistics(values: Tensor, rows: Tensor, index: Tensor) -> _GroupStatistics:
    """Centre `[B, K]` values in their groups, over the rows that are valid `[B]`; `index` `[B]` numbers the groups."""
    number = int(index.max()) + 1 if len(index) else 0
    zeros = values.new_zeros(number, values.shape[1])
    count = values.new_zeros(number).index_add(0, index, rows.double()).clamp(min=1)[:, None]
    mean = zeros.index_add(0, index, values * rows[:, None]) / count
    # Equality of the extremes, not a small std, tells a flat group: the mean of equal values may round off them.
    where = index[:, None].expand_as(values)
    highest = (zeros - torch.inf).scatter_reduce(0, where, values.masked_fill(~rows[:, None], -torch.inf), "amax")
    lowest = (zeros + torch.inf).scatter_reduce(0, where, values.masked_fill(~rows[:, None], torch.inf), "amin")
    flat = (highest <= lowest)[index]
    centred = torch.where(rows[:, None] & ~flat, values - mean[index], 0.0)
    variance = zeros.index_add(0, index, centred**2) / count
    return _GroupStatistics(centred, variance.sqrt()[index], flat)


def _pooled_mean_std(values: Tensor, rows: Tensor, reduce: Reduce | None) -> tuple[Tensor, Tensor]:
    """Return mean and population std over the valid rows of all ranks, 0-d; two passes, so that nothing cancels."""
    first = torch.stack([rows.double().sum(), values[rows].sum()])
    count, total = (first if reduce is None else reduce(first)).unbind()
    count = count.clamp(min=1)
    mean = total / count
    second = ((values[rows] - mean) ** 2).sum().reshape(1)
    squares = (second if reduce is None else reduce(second))[0]
    return mean, (squares / count).sqrt()


def _weighted_sum(values: Tensor, weight: Tensor) -> Tensor:
    """Return sum_k w_k v_k, `[B]`, column by column, so that equal rows give equal sums to the last bit."""
    total = values.new_zeros(len(values))
    for column, factor in zip(values.unbind(1), weight.unbind(), strict=True):
        total = total + factor * column
    return total


def _check_choices(aggregation: str, std: str) -> None:
    if aggregation not in ("sum", "gdpo"):
        raise ValueError(f'aggregation is {aggregation!r}; choose "sum" or "gdpo"')
    if std not in ("global", "group"):
        raise ValueError(f'std is {std!r}; choose "global" or "group"')
    if aggregation == "gdpo" and std == "group":
        raise ValueError(
            'std is "group", but aggregation "gdpo" standardises inside groups already and whitens over all samples; '
            'use std="global", or aggregation="sum"'
        )


def _check_shapes(scores: Tensor, groups: Tensor, valid: Tensor | None) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores is {list(scores.shape)}; it must be [B, R] (use scores[:, None] for a single reward)")
    if groups.shape != scores.shape[:1]:
        raise ValueError(f"groups is {list(groups.shape)}; it must be [{len(scores)}], one id for each row of scores")
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise ValueError(
            f"groups is {groups.dtype}; group ids must be integers, because floats round large ids together"
        )
    if valid is not None and (valid.dtype != torch.bool or valid.shape not in (scores.shape, scores.shape[:1])):
        raise ValueError(
            f"valid is {valid.dtype} {list(valid.shape)}; it must be torch.bool, "
            f"[{len(scores)}] or {list(scores.shape)} like scores"
        )


def _checked_weights(weights: Tensor | Sequence[float] | None, scores: Tensor) -> Tensor:
    """Return the weights as float64 `[R]` beside the scores."""
    if weights is None:
        return torch.ones(scores.shape[1], dtype=torch.float64, device=scores.device)
    weight = torch.as_tensor(weights, dtype=torch.float64, device=scores.device)
    if weight.shape != scores.shape[1:]:
        raise ValueError(
            f"weights is {list(weight.shape)}; it must be [{scores.shape[1]}], one for each reward in scores"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weights is {weight.tolist()}; every weight must be finite")
    return weight
