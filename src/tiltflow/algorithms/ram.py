r"""Reinforce Adjoint Matching (Bergmeister, Jegelka, Nüsken, Domingo-Enrich, Pidstrigach 2026, arXiv 2605.10759).

The paper's loss (eq. 17) pulls the velocity towards the reference plus the reward times the sample's own direction:

    L(theta) = E || v_theta(x_t) - sg[ v_ref(x_t) + r(x0) ((eps - x0) - v_theta(x_t)) ] ||^2,    x0 ~ current model.

As its authors run it, the rollouts and the velocity inside the target come from one lagged policy `old`, and the reward
is the group-relative advantage A times a multiplier m:

    target = v_ref + m A ((eps - x0) - v_old),      L = mean (v_theta - target)^2.

All three velocities are plain conditional passes: guidance belongs to sampling alone.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.algorithms.base import Algorithm, NoisedBatch, Velocities
from tiltflow.flow.paths import interpolate, power_law_grid_times, power_law_times
from tiltflow.types import Conditioning, Config, LossOutput


def ram_target(
    v_ref: Tensor, v_old: Tensor, x0: Tensor, eps: Tensor, advantages: Tensor, *, reward_multiplier: float
) -> Tensor:
    """Return the detached regression target v_ref + m A ((eps - x0) - v_old), `[M, ...]`.

    Args:
        v_ref: Velocity of the reference policy, `[M, ...]`.
        v_old: Velocity of the lagged policy that made the samples, `[M, ...]`.
        x0: Samples, already repeated per noising, `[M, ...]`.
        eps: Noise, `[M, ...]`.
        advantages: Already repeated per noising, `[M]`; not clipped.
        reward_multiplier: m, the strength of the tilt.
    """
    scale = (reward_multiplier * advantages).reshape(-1, *([1] * (x0.ndim - 1))).to(v_ref.dtype)
    return (v_ref + scale * ((eps - x0) - v_old)).detach()


def ram_loss(v_theta: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (v_theta - target)^2 over everything: no time weight, no clipping."""
    return (v_theta - target).square().mean()


class RAMConfig(Config):
    """Options of RAM; the defaults are the authors' for GenEval and OCR."""

    reward_multiplier: float = Field(default=100.0, gt=0)
    num_noisings: int = Field(default=8, ge=1)
    time_sampling: Literal["grid", "continuous"] = "grid"
    time_power: float = Field(default=1.0, ge=0)
    old_decay_rate: float = Field(default=0.01, ge=0)
    old_decay_max: float = Field(default=0.9, ge=0, le=1)


class RAM(Algorithm):
    """RAM with a lagged policy, K noisings per sample and one optimiser update per epoch."""

    metric_names = ("drift", "target_scale")

    def __init__(self, config: RAMConfig):
        self.config = config

    def noise(
        self,
        latents: Tensor,
        advantages: Tensor,
        conditioning: Conditioning,
        *,
        sigmas: Tensor,
        generator: torch.Generator,
    ) -> NoisedBatch:
        """Draw K fresh (t, eps) per sample, with the density of t proportional to t^alpha."""
        copies = self.config.num_noisings
        rows = torch.arange(len(latents)).repeat_interleave(copies)
        if self.config.time_sampling == "grid":
            t = power_law_grid_times(len(rows), sigmas=sigmas, alpha=self.config.time_power, generator=generator)
        else:
            t = power_law_times(len(rows), alpha=self.config.time_power, generator=generator)
        eps = torch.randn((len(rows), *latents.shape[1:]), generator=generator)
        rows = rows.to(latents.device)
        return NoisedBatch(
            x0=latents[rows],
            eps=eps.to(latents),
            t=t.to(latents),
            advantages=advantages.to(latents)[rows],
            conditioning=conditioning.expand(len(rows)),
        )

    def loss(self, batch: NoisedBatch, policy: Velocities) -> LossOutput:
        """Regress v_theta onto the RAM target; metrics hold the drift from the reference, mean ||v - v_ref||^2."""
        x_t = interpolate(batch.x0, batch.eps, batch.t)
        v_ref = policy.of("ref", x_t, batch.t, batch.conditioning)
        v_old = policy.of("old", x_t, batch.t, batch.conditioning)
        target = ram_target(
            v_ref, v_old, batch.x0, batch.eps, batch.advantages, reward_multiplier=self.config.reward_multiplier
        )
        v_theta = policy.current(x_t, batch.t, batch.conditioning)
        drift = (v_theta.detach() - v_ref).square().mean()
        return LossOutput(ram_loss(v_theta, target), {"drift": drift, "target_scale": target.square().mean()})

    def old_decay(self, epoch: int) -> float:
        """Return d = min(rate * epoch, max)."""
        return min(self.config.old_decay_rate * epoch, self.config.old_decay_max)
