"""The linear path against its two identities, the time samplers against the distributions they promise."""

import math

import pytest
import torch
from torch import Tensor

from tiltflow.flow import (
    interpolate,
    logit_normal_times,
    power_law_grid_times,
    power_law_times,
    velocity_to_eps,
    velocity_to_x0,
)

GRID = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0])
DRAWS = 40_000
# A frequency of n draws has standard error sqrt(p (1 - p) / n) <= 0.5 / sqrt(n). Chance passes five of them (0.0125)
# less than once in a million times; uniform draws would be off by 0.14 at alpha = 0.5 and by more above it.
FREQUENCY_TOLERANCE = 5 * 0.5 / math.sqrt(DRAWS)
# Dvoretzky, Kiefer, Wolfowitz: P(max |F_n - F| > d) <= 2 exp(-2 n d^2), whatever F. This d (0.0167) makes it 4e-10.
DISTRIBUTION_TOLERANCE = math.sqrt(math.log(2 / 4e-10) / (2 * DRAWS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def distance(cdf_at_draws: Tensor) -> float:
    """Return max |F_n - F| of draws, given F at each of them: the Kolmogorov-Smirnov statistic."""
    values = cdf_at_draws.double().sort().values
    count = len(values)
    above = torch.arange(1, count + 1, dtype=torch.float64) / count - values
    below = values - torch.arange(count, dtype=torch.float64) / count
    return max(above.max().item(), below.max().item())


# --- path -------------------------------------------------------------------------------------------------------------


def test_interpolation_by_hand_and_at_both_ends() -> None:
    x0, eps = torch.tensor([[2.0, -4.0]]).expand(3, 2), torch.tensor([[10.0, 8.0]]).expand(3, 2)
    expected = torch.tensor([[2.0, -4.0], [4.0, -1.0], [10.0, 8.0]])
    assert torch.equal(interpolate(x0, eps, torch.tensor([0.0, 0.25, 1.0])), expected)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 4, 2, 2), (5, 4, 3, 2, 2)])
def test_velocity_gives_back_data_and_noise(shape: tuple[int, ...]) -> None:
    x0, eps = latents(*shape), latents(*shape, seed=1)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, velocity = interpolate(x0, eps, t), eps - x0
    torch.testing.assert_close(velocity_to_x0(x_t, velocity, t), x0, atol=1e-14, rtol=0)
    torch.testing.assert_close(velocity_to_eps(x_t, velocity, t), eps, atol=1e-14, rtol=0)


def test_any_velocity_splits_a_point_into_data_and_noise_that_make_it_up() -> None:
    x_t, velocity = latents(4, 3, 2), latents(4, 3, 2, seed=1)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)
    x0, eps = velocity_to_x0(x_t, velocity, t), velocity_to_eps(x_t, velocity, t)
    torch.testing.assert_close(interpolate(x0, eps, t), x_t, atol=1e-14, rtol=0)
    torch.testing.assert_close(eps - x0, velocity, atol=1e-14, rtol=0)


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, eps = latents(3, 2), latents(3, 2, seed=1)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    slope = (interpolate(x0, eps, t + 1e-4) - interpolate(x0, eps, t - 1e-4)) / 2e-4
    torch.testing.assert_close(slope, eps - x0, atol=1e-10, rtol=0)


def test_half_precision_latents_stay_in_half_precision() -> None:
    x0, eps = latents(2, 3, dtype=torch.bfloat16), latents(2, 3, seed=1, dtype=torch.bfloat16)
    t = torch.tensor([0.25, 0.5])
    for function in (interpolate, velocity_to_x0, velocity_to_eps):
        assert function(x0, eps, t).dtype == torch.bfloat16


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_grid_times_come_in_proportion_to_their_power(alpha: float) -> None:
    times = power_law_grid_times(DRAWS, sigmas=GRID, alpha=alpha, generator=seeded())
    powers = [sigma**alpha for sigma in (1.0, 0.8, 0.5, 0.1)]
    found = [(times == sigma).double().mean().item() for sigma in GRID[:-1]]
    assert sum(found) == pytest.approx(1.0, abs=1e-12)  # the final 0 is never drawn
    assert found == pytest.approx([power / sum(powers) for power in powers], abs=FREQUENCY_TOLERANCE)


def test_a_grid_without_its_final_zero_gives_the_same_times() -> None:
    whole = power_law_grid_times(50, sigmas=GRID, alpha=1.0, generator=seeded())
    assert torch.equal(power_law_grid_times(50, sigmas=GRID[:-1], alpha=1.0, generator=seeded()), whole)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
def test_continuous_times_have_a_power_law_density(alpha: float) -> None:
    times = power_law_times(DRAWS, alpha=alpha, generator=seeded())
    assert times.shape == (DRAWS,) and times.min() > 0 and times.max() <= 1
    assert distance(times.double() ** (alpha + 1)) < DISTRIBUTION_TOLERANCE


@pytest.mark.parametrize("law", [{}, {"mean": 0.0, "std": 1.0}, {"mean": -0.7, "std": 0.6}, {"mean": 0.5, "std": 1.4}])
def test_logit_normal_times_have_a_normal_logit(law: dict[str, float]) -> None:
    times = logit_normal_times(DRAWS, generator=seeded(), **law)
    assert times.shape == (DRAWS,) and times.min() > 0 and times.max() < 1
    normal = torch.distributions.Normal(law.get("mean", 0.0), law.get("std", 1.0))
    assert distance(normal.cdf(times.double().logit())) < DISTRIBUTION_TOLERANCE


def test_times_depend_on_the_generator_alone() -> None:
    def draw(seed: int) -> list[Tensor]:
        generator = seeded(seed)
        return [
            logit_normal_times(9, generator=generator),
            power_law_times(9, alpha=1.0, generator=generator),
            power_law_grid_times(9, sigmas=GRID, alpha=1.0, generator=generator),
        ]

    first = draw(3)
    torch.manual_seed(1)
    assert all(torch.equal(one, again) for one, again in zip(first, draw(3), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(first, draw(4), strict=True))
