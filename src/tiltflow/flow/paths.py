"""The linear path between data and noise, conversions along it, and samplers of time.

Conventions of the whole package: t = 0 is data, t = 1 is noise,

    x_t = (1 - t) x0 + t eps,        v = dx_t/dt = eps - x0,
    x0  = x_t - t v,                 eps = x_t + (1 - t) v.
"""

import torch
from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times `[B]` so that they broadcast over `like`, `[B, ...]`."""
    return t.reshape(-1, *([1] * (like.ndim - 1))).to(like.dtype)


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x0 + t eps.

    Args:
        x0: Data, `[B, ...]`.
        eps: Noise, `[B, ...]`.
        t: Times in [0, 1], `[B]`.
    """
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * eps


def velocity_to_x0(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Return the data estimate x0 = x_t - t v, `[B, ...]`."""
    return x_t - expand_time(t, x_t) * velocity


def velocity_to_eps(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Return the noise estimate eps = x_t + (1 - t) v, `[B, ...]`."""
    return x_t + (1 - expand_time(t, x_t)) * velocity


def logit_normal_times(count: int, *, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Sample times whose logit is normal, `[count]` (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def power_law_times(count: int, *, alpha: float, generator: torch.Generator) -> Tensor:
    """Sample times in (0, 1] with density proportional to t^alpha, by inverting its distribution, `[count]`."""
    u = 1 - torch.rand(count, generator=generator)
    return u ** (1 / (alpha + 1))


def power_law_grid_times(count: int, *, sigmas: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw times from a sampler's grid with probability proportional to sigma^alpha, `[count]`.

    Args:
        count: How many.
        sigmas: The grid, `[N]` or `[N + 1]` with the final 0, which is never drawn for alpha > 0.
        alpha: Exponent; 0 draws every grid time but the final 0 alike.
        generator: Source of randomness.
    """
    grid = sigmas[sigmas > 0]
    index = torch.multinomial(grid.double() ** alpha, count, replacement=True, generator=generator)
    return grid[index]
