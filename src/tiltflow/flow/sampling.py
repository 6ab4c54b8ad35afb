"""The one integration loop of the package: every policy, every sampler, with or without gradients."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from tiltflow.flow.steps import cps_step, dance_sde_step, euler_step, sde_step
from tiltflow.types import Conditioning

Dynamics = Literal["ode", "sde", "cps", "dance"]
_STOCHASTIC_STEPS = {"sde": sde_step, "cps": cps_step, "dance": dance_sde_step}


class VelocityModel(Protocol):
    """A network that predicts v(x_t, t, c) for latents `[B, ...]`, times `[B]` and conditioning `[B, ...]`."""

    def __call__(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity, `[B, ...]`."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """What one integration leaves behind; the lists are empty unless `keep_trajectory` was set."""

    latents: Tensor  # [B, ...], the final x0
    states: tuple[Tensor, ...] = ()  # N + 1 tensors [B, ...], noise first
    log_probs: tuple[Tensor, ...] = ()  # N tensors [B]; only with stochastic dynamics


def guided_velocity(
    model: VelocityModel,
    latents: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    *,
    negative: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """Return v_neg + w (v_cond - v_neg), classifier-free guidance (Ho and Salimans 2022), in one doubled batch.

    A scale of exactly 1 needs no negative pass and makes none.
    """
    if guidance_scale == 1.0:
        return model(latents, t, conditioning)
    if negative is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs the negative conditioning; pass it, or use 1.0")
    both = model(torch.cat([latents, latents]), torch.cat([t, t]), Conditioning.cat([negative, conditioning]))
    unconditional, conditional = both.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def sample(
    model: VelocityModel,
    noise: Tensor,
    *,
    sigmas: Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    guidance_scale: float = 1.0,
    dynamics: Dynamics = "ode",
    noise_level: float = 0.0,
    generator: torch.Generator | None = None,
    keep_trajectory: bool = False,
    grad: bool = False,
) -> Trajectory:
    """Integrate from noise to data along a decreasing grid of times.

    Args:
        model: Predicts the velocity.
        noise: x at `sigmas[0]`, `[B, ...]`.
        sigmas: Decreasing times ending in 0, `[N + 1]`.
        conditioning: Prompt embeddings, `[B, ...]`.
        negative: Embeddings of the negative prompt, `[B, ...]`; needed when `guidance_scale` is not 1.
        guidance_scale: Weight of classifier-free guidance; 1 is off.
        dynamics: `ode` is the deterministic Euler step; the others are the stochastic steps of `flow/steps.py`.
        noise_level: How stochastic the stochastic steps are.
        generator: Randomness of the stochastic steps.
        keep_trajectory: Keep every state (and log-probability).
        grad: Keep the graph through every step.

    Returns:
        The final latents and, if asked for, the way there.
    """
    latents = noise
    states, log_probs = [noise], list[Tensor]()
    with torch.set_grad_enabled(grad):
        for sigma, sigma_next in pairwise(sigmas):
            velocity = guided_velocity(
                model,
                latents,
                sigma.expand(len(latents)),
                conditioning,
                negative=negative,
                guidance_scale=guidance_scale,
            )
            if dynamics == "ode":
                latents = euler_step(latents, velocity, sigma, sigma_next)
            else:
                step = partial(_STOCHASTIC_STEPS[dynamics], noise_level=noise_level, sigma_max=sigmas[1])
                result = step(latents, velocity, sigma, sigma_next, generator=generator)
                latents = result.prev_sample
                log_probs.append(result.log_prob)
            if keep_trajectory:
                states.append(latents)
    return Trajectory(latents, tuple(states) if keep_trajectory else (), tuple(log_probs) if keep_trajectory else ())
