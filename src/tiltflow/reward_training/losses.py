"""Losses of language reward models: Bradley-Terry on pairs, and squared errors on ratings, some of which are missing.

Each comes twice: as a mean with its metrics, and as sums over samples, which add up over micro-batches and processes.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.data.ratings import MISSING
from tiltflow.errors import ConfigError, TrainingError

Sums: TypeAlias = dict[str, Tensor]  # scalars, detached


def bradley_terry(
    rewards_chosen: Tensor,
    rewards_rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    center_coefficient: float | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    tie_threshold: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean Bradley-Terry loss over valid pairs.

    loss = mean_i [s_i (-p_i log sigmoid(d_i - m_i) - (1 - p_i) log sigmoid(-d_i - m_i)) + c u_i^2]
    with d = r_chosen - r_rejected, u = r_chosen + r_rejected, margin m (0), scale s (1), label p (1) and centring
    coefficient c (0).

    Sources: Bradley and Terry 1952; margin: Llama 2 (arXiv:2307.09288, section 3.2.2); scale: HelpSteer2-Preference
    (arXiv:2410.01257, section 3.2); centring: Eisenstein et al. 2023 (arXiv:2312.09244, equation 2).

    Example: `bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]))` has the loss log(1 + 1/e) = 0.3133.

    Args:
        rewards_chosen: `[B]`; half precision is raised to float32.
        rewards_rejected: `[B]`.
        margin: By how much the chosen one shall be better, `[B]` or one for all.
        scale: How much a pair counts, `[B]` or one for all; the mean still divides by the number of pairs.
        center_coefficient: Weight of the term that keeps the rewards around zero.
        mask: Zero for pairs that do not count, `[B]`, or `[B, ...]` for those whose mask is zero throughout.
        labels: Probability that the chosen one is the better one, `[B]` in [0, 1]; 0.5 is a tie.
        tie_threshold: Half the width eta > 0 of the range of differences that people call a tie (Rao and Kupper 1967):
            m grows by eta, and a tie costs -log((e^(2 eta) - 1) sigmoid(d - eta) sigmoid(-d - eta)). None teaches
            ties as p = 0.5.

    Returns:
        The loss, 0 where no pair is valid; and detached scalars: `loss`, `acc` (how often strictly the better one has
        the higher reward; ties in the labels are left out, NaN if nothing is left) over valid pairs; and
        `rewards_chosen_mean`, `rewards_rejected_mean`, `rewards_all_mean` and `rewards_all_std` (n - 1) over all pairs,
        masked ones too.

    Raises:
        ConfigError: `tie_threshold` is not positive.
    """
    chosen, rejected = _at_least_float32(rewards_chosen), _at_least_float32(rewards_rejected)
    valid = torch.ones_like(chosen) if mask is None else (mask.flatten(1).sum(1) if mask.ndim > 1 else mask) > 0
    loss, sums = bradley_terry_sums(
        chosen,
        rejected,
        weights=valid.to(chosen.dtype),
        margin=margin,
        scale=scale,
        center_coefficient=center_coefficient,
        labels=labels,
        tie_threshold=tie_threshold,
    )
    mean = loss / sums["pairs"].clamp(min=1).to(loss.dtype)
    metrics = {"loss": mean.detach(), "acc": sums["right"] / sums["decided"]}
    return mean, metrics | _statistics(chosen.detach(), rejected.detach())


def bradley_terry_sums(
    rewards_chosen: Tensor,
    rewards_rejected: Tensor,
    *,
    weights: Tensor,
    margin: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    center_coefficient: float | None = None,
    labels: Tensor | None = None,
    tie_threshold: float | None = None,
) -> tuple[Tensor, Sums]:
    """Return `bradley_terry` as sums over pairs of weight 1.

    Args:
        rewards_chosen: `[B]`.
        rewards_rejected: `[B]`.
        weights: 1, or 0 for a pair that counts nowhere, `[B]`.
        margin: As there, and so are the rest.
        scale: As there.
        center_coefficient: As there.
        labels: As there.
        tie_threshold: As there.

    Returns:
        The differentiable sum of the losses; and float64 sums over the pairs of weight 1, for `bradley_terry_metrics`.
    """
    chosen, rejected = _at_least_float32(rewards_chosen), _at_least_float32(rewards_rejected)
    counts = weights > 0
    # What does not count may be NaN; neither the sum nor the gradient may see it.
    chosen, rejected = (torch.where(counts, rewards, torch.zeros_like(rewards)) for rewards in (chosen, rejected))
    p = torch.ones_like(chosen) if labels is None else labels.to(chosen)
    loss = pair_losses(chosen - rejected, p, margin=margin, tie_threshold=tie_threshold)
    if scale is not None:
        loss = loss * scale
    if center_coefficient is not None:
        loss = loss + center_coefficient * (chosen + rejected) ** 2
    loss = torch.where(counts, loss, torch.zeros_like(loss)).sum()
    with torch.no_grad():
        decided = counts & (p != 0.5)
        right = decided & torch.where(p > 0.5, chosen > rejected, rejected > chosen)
        r_c, r_r = chosen.double(), rejected.double()
        sums = {
            "loss": loss.detach().double(),
            "pairs": counts.sum().double(),
            "decided": decided.sum().double(),
            "right": right.sum().double(),
            "chosen": r_c.sum(),
            "rejected": r_r.sum(),
            "squares": (r_c**2 + r_r**2).sum(),
        }
    return loss, sums


def pair_losses(
    difference: Tensor, labels: Tensor, *, margin: Tensor | float | None = None, tie_threshold: float | None = None
) -> Tensor:
    """Return the loss of each pair, `[B]`, from r_chosen - r_rejected and the probability p of being better, `[B]`.

    Raises:
        ConfigError: `tie_threshold` is not positive.
    """
    if tie_threshold is not None and tie_threshold <= 0:
        raise ConfigError(f"tie_threshold={tie_threshold:g}: use a positive number, or None to teach ties as p = 0.5")
    m = 0.0 if margin is None else margin
    if tie_threshold is not None:
        m = m + tie_threshold
    wins, loses = F.logsigmoid(difference - m), F.logsigmoid(-difference - m)
    # Where p is 1, the other term is left out: 0 times an infinite loss would be NaN.
    loss = -torch.where(labels > 0, labels * wins, 0.0) - torch.where(labels < 1, (1 - labels) * loses, 0.0)
    if tie_threshold is None:
        return loss
    eta = torch.as_tensor(tie_threshold, dtype=difference.dtype, device=difference.device)
    tie = -torch.log(torch.expm1(2 * eta)) - F.logsigmoid(difference - eta) - F.logsigmoid(-difference - eta)
    return torch.where(labels == 0.5, tie, loss)


def bradley_terry_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of the pairs that `bradley_terry_sums` were added up over; NaN where there was nothing."""
    pairs = sums["pairs"]
    rewards = 2 * pairs
    total = sums["chosen"] + sums["rejected"]
    variance = _ratio(sums["squares"] - total * _ratio(total, rewards), rewards - 1)
    return {
        "loss": _ratio(sums["loss"], pairs),
        "acc": _ratio(sums["right"], sums["decided"]),
        "rewards_chosen_mean": _ratio(sums["chosen"], pairs),
        "rewards_rejected_mean": _ratio(sums["rejected"], pairs),
        "rewards_all_mean": _ratio(total, rewards),
        "rewards_all_std": max(variance, 0.0) ** 0.5 if variance == variance else variance,
    }


def masked_mse(
    predictions: Tensor, labels: Tensor, *, ignore_value: float = MISSING
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean squared error over the labels that are there.

    loss = sum_ij m_ij (prediction_ij - label_ij)^2 / sum_ij m_ij with m = (label != ignore_value).

    Source: SteerLM (arXiv:2310.05344) and HelpSteer2 (arXiv:2406.08673).

    Args:
        predictions: `[B, A]`; half precision is raised to float32.
        labels: `[B, A]`; `ignore_value` where there is none.
        ignore_value: What stands for no label.

    Returns:
        The loss, and the detached scalar `loss`.

    Raises:
        TrainingError: No label is there at all.
    """
    loss, sums = masked_mse_sums(predictions, labels, ignore_value=ignore_value)
    if not sums["labels"]:
        raise TrainingError(f"all {labels.numel()} labels of the batch are {ignore_value:g}, which stands for none")
    mean = loss / sums["labels"].to(loss.dtype)
    return mean, {"loss": mean.detach()}


def masked_mse_sums(
    predictions: Tensor, labels: Tensor, *, weights: Tensor | None = None, ignore_value: float = MISSING
) -> tuple[Tensor, Sums]:
    """Return `masked_mse` as sums over labels.

    Args:
        predictions: `[B, A]`.
        labels: `[B, A]`.
        weights: 1, or 0 for a row that counts nowhere, `[B]`.
        ignore_value: What stands for no label.

    Returns:
        The differentiable sum of squared errors; and float64 sums: `loss`, `labels` (how many) and `errors` (absolute).
    """
    predicted = _at_least_float32(predictions)
    there = labels != ignore_value
    if weights is not None:
        there = there & (weights > 0).unsqueeze(-1)
    error = torch.where(there, predicted - labels.to(predicted), torch.zeros_like(predicted))
    loss = error.square().sum()
    with torch.no_grad():
        sums = {
            "loss": loss.detach().double(),
            "labels": there.sum().double(),
            "errors": error.detach().double().abs().sum(),
        }
    return loss, sums


def masked_mse_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return `loss` and `mae`, the mean absolute error; NaN where there was no label."""
    return {"loss": _ratio(sums["loss"], sums["labels"]), "mae": _ratio(sums["errors"], sums["labels"])}


def _statistics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    both = torch.cat([chosen, rejected])
    return {
        "rewards_chosen_mean": chosen.mean(),
        "rewards_rejected_mean": rejected.mean(),
        "rewards_all_mean": both.mean(),
        "rewards_all_std": both.std() if len(both) > 1 else both.new_tensor(torch.nan),
    }


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")
