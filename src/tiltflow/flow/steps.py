"""The noise schedule and one step along it: deterministic (Euler) or stochastic with a log-probability.

With s = sigma, s' = sigma_next < s, dt = s' - s < 0 and a = noise_level, every stochastic step draws

    x' = mean + std * noise,    noise ~ N(0, I),

    step            mean                                                            std
    sde_step        x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt         g sqrt(-dt), g = a sqrt(s / (1 - s))
    dance_sde_step  x + (v + a^2 (x - (1 - s) x0) / (2 s^2)) dt, x0 = x - s v       a sqrt(-dt)
    cps_step        (1 - s') x0 + sqrt(s'^2 - std^2) eps, eps = x + (1 - s) v       s' sin(a pi / 2)

Arithmetic is in float32, or in float64 when the latents are float64; half-precision latents come back as float32,
because a log-probability of a step of std 0.006 does not survive half precision.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Sigma = float | Tensor
# A schedule whose first entry is 1 up to float32 rounding (a shift such as 1.7 gives 1 - 6e-8) starts at pure noise.
ONE_ROUNDING = 1e-6


@dataclass(frozen=True)
class StepResult:
    """Outcome of one stochastic step.

    Example: a batch of two SD3 latents has `prev_sample [2, 16, 64, 64]`, `log_prob [2]`, `std [2]`.
    """

    prev_sample: Tensor  # [B, ...] the next, less noisy latent
    log_prob: Tensor  # [B] mean over the non-batch dimensions; its gradient flows through `mean` only
    mean: Tensor  # [B, ...]
    std: Tensor  # [B] standard deviation of prev_sample, sqrt(-dt) included


def sigma_schedule(num_steps: int, *, shift: float = 3.0, num_train_timesteps: int = 1000) -> Tensor:
    """Return the noise levels of a sampler, from 1 down to 0, as diffusers' flow-matching Euler scheduler builds them.

    The end points f(1) and f(1 / num_train_timesteps) with f(s) = shift s / (1 + (shift - 1) s) are joined by a
    straight line, f is applied to that line a second time, and 0 is appended. The double shift is not a slip here:
    released models are sampled with it.

    Args:
        num_steps: Number of steps, at least 1.
        shift: Static time shift, positive; 3 for SD3.5, 1 for none.
        num_train_timesteps: Number of discrete times the model was trained with.

    Returns:
        Float32 `[num_steps + 1]`, decreasing, the last entry 0. The model's timestep input is sigma * 1000.

    Raises:
        ValueError: If an argument is out of range.

    Source: diffusers 0.42, `FlowMatchEulerDiscreteScheduler.set_timesteps` without dynamic shifting.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}; it must be positive (1 leaves the schedule unshifted)")
    if num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 2 (1000 for SD3)")
    # The end points are shifted in float32 and the line in float64, as in the source, so that tables agree bit for bit.
    ends = torch.tensor([num_train_timesteps, 1], dtype=torch.float32) / num_train_timesteps
    first, last = (shift * ends / (1 + (shift - 1) * ends)).double() * num_train_timesteps
    line = torch.arange(num_steps, dtype=torch.float64) * ((last - first) / max(num_steps - 1, 1)) + first
    line = line / num_train_timesteps
    sigmas = (shift * line / (1 + (shift - 1) * line)).float()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def euler_step(sample: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma) -> Tensor:
    """Follow the velocity in a straight line: x' = x + (s' - s) v.

    Either direction is allowed, so the same step also carries data back to noise.

    Args:
        sample: Latents x at `sigma`, `[B, ...]`.
        velocity: Model output v = eps - x0 there, `[B, ...]`.
        sigma: Noise level in [0, 1]: a float, 0-d or `[B]`.
        sigma_next: Noise level after the step, the same forms.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    x, v = _latents(sample, velocity)
    return x + (_level(sigma_next, x, "sigma_next") - _level(sigma, x, "sigma")) * v


def sde_step(
    sample: Tensor,
    velocity: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    *,
    noise_level: float,
    sigma_max: Sigma | None = None,
    noise: Tensor | None = None,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> StepResult:
    """Take one Euler-Maruyama step of the reverse SDE that keeps the ODE's marginals (Flow-SDE).

    Args:
        sample: Latents x at `sigma`, `[B, ...]`.
        velocity: Model output v = eps - x0 there, `[B, ...]`.
        sigma: Noise level s in (0, 1]: a float, 0-d or `[B]`.
        sigma_next: Next noise level s' in [0, s), the same forms.
        noise_level: The SDE's a, not negative; 0 gives the Euler step, whose log-probability is undefined (NaN).
        sigma_max: Second entry of the schedule; stands in for s in the 1 - s of g where s = 1, as g is infinite there.
        noise: Standard normal noise, `[B, ...]`; drawn from `generator` when absent.
        prev_sample: A next latent drawn earlier, `[B, ...]`: its log-probability is wanted, and no noise is used.
        generator: Source of the noise, on any device; PyTorch's global one when absent.

    Raises:
        ValueError: If shapes do not fit, a noise level is out of range, or s = 1 and `sigma_max` is not in (0, 1).

    Source: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), "From ODE to SDE", and its released code.
    """
    x, v = _latents(sample, velocity)
    s, s_next = _levels(sigma, sigma_next, x)
    _check_noise_level(noise_level)
    safe = _away_from_noise(s, sigma_max, x)
    g, dt = noise_level * torch.sqrt(s / (1 - safe)), s_next - s
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    drawn = _draw(mean, std, noise=noise, prev_sample=prev_sample, generator=generator)
    return StepResult(drawn, _gaussian_log_prob(drawn, mean, std), mean, _per_row(std, x))


def dance_sde_step(
    sample: Tensor,
    velocity: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    *,
    noise_level: float,
    sigma_max: Sigma | None = None,
    noise: Tensor | None = None,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> StepResult:
    """Take one step of the SDE whose noise is the same at every level (Dance-SDE).

    Args and errors are those of `sde_step`; `sigma_max` is accepted for the common signature and has no role, since
    the noise is finite everywhere.

    Source: DanceGRPO (Xue et al. 2025, arXiv 2505.07818), as in Flow-Factory's scheduler.
    """
    x, v = _latents(sample, velocity)
    s, s_next = _levels(sigma, sigma_next, x)
    _check_noise_level(noise_level)
    dt = s_next - s
    score_term = (x - (x - s * v) * (1 - s)) / s**2
    mean = x + (v + 0.5 * noise_level**2 * score_term) * dt
    std = noise_level * torch.sqrt(-dt)
    drawn = _draw(mean, std, noise=noise, prev_sample=prev_sample, generator=generator)
    return StepResult(drawn, _gaussian_log_prob(drawn, mean, std), mean, _per_row(std, x))


def cps_step(
    sample: Tensor,
    velocity: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    *,
    noise_level: float,
    sigma_max: Sigma | None = None,
    noise: Tensor | None = None,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> StepResult:
    """Take one coefficients-preserving step: part of the predicted noise is replaced by fresh noise of the same size.

    The log-probability is -mean((x' - mean)^2), without variance or constants, as in the source: the last step has
    std 0, where a Gaussian density would be infinite.

    Args and errors are those of `sde_step`, except that `noise_level` lies in [0, 1]; `sigma_max` has no role.

    Source: coefficients-preserving sampling (Wang and Yu 2025, arXiv 2509.05952), as in Flow-GRPO-Fast.
    """
    x, v = _latents(sample, velocity)
    s, s_next = _levels(sigma, sigma_next, x)
    _check_noise_level(noise_level, maximum=1.0)
    std = s_next * math.sin(noise_level * math.pi / 2)
    kept = torch.sqrt((s_next**2 - std**2).clamp(min=0))  # rounding may fall below 0 at noise_level 1
    mean = (x - s * v) * (1 - s_next) + (x + (1 - s) * v) * kept
    drawn = _draw(mean, std, noise=noise, prev_sample=prev_sample, generator=generator)
    log_prob = -((drawn.detach() - mean) ** 2).flatten(1).mean(1)
    return StepResult(drawn, log_prob, mean, _per_row(std, x))


def _latents(sample: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Check that latents and velocity fit each other and return both in the arithmetic's precision."""
    if sample.shape != velocity.shape or sample.ndim < 2:
        raise ValueError(
            f"sample is {list(sample.shape)} and velocity {list(velocity.shape)}; both must be one shape [B, ...]"
        )
    dtype = torch.promote_types(torch.promote_types(sample.dtype, velocity.dtype), torch.float32)
    return sample.to(dtype), velocity.to(dtype)


def _level(value: Sigma, like: Tensor, name: str) -> Tensor:
    """Return a noise level as `[B or 1, 1, ...]` that broadcasts over `like`, `[B, ...]`."""
    level = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if level.ndim > 1 or (level.ndim == 1 and len(level) not in (1, len(like))):
        raise ValueError(f"{name} is {list(level.shape)}; it must be a float, 0-d or [{len(like)}] like the batch")
    return level.reshape(-1, *([1] * (like.ndim - 1)))


def _levels(sigma: Sigma, sigma_next: Sigma, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return both noise levels of a stochastic step, checked to lie on a denoising schedule."""
    s, s_next = _level(sigma, like, "sigma"), _level(sigma_next, like, "sigma_next")
    if not bool(((s_next >= 0) & (s_next < s) & (s <= 1 + ONE_ROUNDING)).all()):
        raise ValueError(
            f"sigma is {sigma} and sigma_next is {sigma_next}; they must satisfy 0 <= sigma_next < sigma <= 1: "
            "take neighbours from sigma_schedule"
        )
    return s, s_next


def _away_from_noise(s: Tensor, sigma_max: Sigma | None, like: Tensor) -> Tensor:
    """Return the noise levels with `sigma_max` in place of 1, where the SDE's noise would be infinite."""
    at_noise = s > 1 - ONE_ROUNDING
    if not bool(at_noise.any()):
        return s
    substitute = None if sigma_max is None else _level(sigma_max, like, "sigma_max")
    if substitute is None or not bool(((substitute > 0) & (substitute < 1 - ONE_ROUNDING)).all()):
        raise ValueError(
            f"sigma is 1, where the SDE's noise is infinite, and sigma_max is {sigma_max}; "
            "pass sigma_max=sigmas[1] of a schedule of at least two steps, which lies in (0, 1)"
        )
    return torch.where(at_noise, substitute, s)


def _check_noise_level(noise_level: float, *, maximum: float = math.inf) -> None:
    if not (0 <= noise_level <= maximum and math.isfinite(noise_level)):
        raise ValueError(f"noise_level is {noise_level}; it must be finite and in [0, {maximum:g}]")


def _draw(
    mean: Tensor, std: Tensor, *, noise: Tensor | None, prev_sample: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Return the given next latent, or a new one from N(mean, std^2)."""
    name, given = ("prev_sample", prev_sample) if prev_sample is not None else ("noise", noise)
    if given is not None and given.shape != mean.shape:
        raise ValueError(f"{name} is {list(given.shape)}; it must have the shape of sample, {list(mean.shape)}")
    if prev_sample is not None:
        return prev_sample.to(mean)
    if noise is None:
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=device)
    return mean + std * noise.to(mean)


def _gaussian_log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the mean log density over the non-batch dimensions, `[B]`; the latent counts as a constant."""
    log_density = -((prev_sample.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def _per_row(std: Tensor, like: Tensor) -> Tensor:
    return std.flatten().expand(len(like)).clone()
