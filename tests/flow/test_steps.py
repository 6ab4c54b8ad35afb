"""The schedule against diffusers, the steps against released code and closed forms."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.shared import case_tensors, golden, requires_shared
from tiltflow.flow.steps import StepResult, cps_step, dance_sde_step, euler_step, sde_step, sigma_schedule

STEPS = {"flow_sde_step": sde_step, "cps_step": cps_step, "dance_sde_step": dance_sde_step}
MEAN_TOLERANCE = {"flow_sde_step": 5e-6, "cps_step": 5e-6, "dance_sde_step": 5e-5}
CASES = [pytest.param(name, index, id=f"{name}-{index}") for name in STEPS for index in range(11)]


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 1.7, 2.0, 3.0, 6.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 14, 20, 28, 40, 100])
def test_schedule_equals_diffusers_bit_for_bit(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = sigma_schedule(num_steps, shift=shift)
    assert sigmas.dtype == torch.float32
    assert torch.equal(sigmas, scheduler.sigmas)
    assert torch.equal(sigmas[:-1] * 1000, scheduler.timesteps)


def test_schedule_with_other_training_times_equals_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=250)
    scheduler.set_timesteps(17)
    assert torch.equal(sigma_schedule(17, num_train_timesteps=250), scheduler.sigmas)


@requires_shared
@pytest.mark.parametrize("num_steps", [10, 20, 28, 40])
def test_schedule_equals_golden_tables(num_steps: int) -> None:
    tensors = golden("algorithms/flow_sde_step")[1]
    sigmas = sigma_schedule(num_steps)
    torch.testing.assert_close(sigmas, tensors[f"sigmas_{num_steps}"], atol=1e-7, rtol=0)
    torch.testing.assert_close(sigmas[:-1] * 1000, tensors[f"timesteps_{num_steps}"], atol=1e-4, rtol=0)


def test_unshifted_schedule_is_a_straight_line_to_one_training_step() -> None:
    torch.testing.assert_close(sigma_schedule(4, shift=1.0), torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"num_steps": 5, "shift": 0.0}, r"shift is 0\.0; it must be positive"),
        ({"num_steps": 5, "shift": math.nan}, "shift is nan"),
        ({"num_steps": 5, "num_train_timesteps": 1}, "num_train_timesteps is 1"),
    ],
)
def test_schedule_rejects_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigma_schedule(**arguments)


# --- golden steps -----------------------------------------------------------------------------------------------------


def golden_case(name: str, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta, tensors = golden(f"algorithms/{name}")
    assert len(meta["cases"]) == 11
    return meta["cases"][index], case_tensors(tensors, index)


def take(name: str, case: dict[str, Any], t: dict[str, Tensor], **given: Any) -> StepResult:
    arguments = {"sigma_max": t["sigma_max"], "noise_level": case["noise_level"], **given}
    return STEPS[name](t["sample"], arguments.pop("velocity", t["velocity"]), t["sigma"], t["sigma_next"], **arguments)


@requires_shared
@pytest.mark.parametrize(("name", "index"), CASES)
def test_golden_mean_std_and_log_prob(name: str, index: int) -> None:
    case, t = golden_case(name, index)
    result = take(name, case, t, prev_sample=t["prev_sample"])
    torch.testing.assert_close(result.mean, t["mean"], atol=MEAN_TOLERANCE[name], rtol=0)
    torch.testing.assert_close(result.std, t["std"], atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(result.log_prob, t["log_prob"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.log_prob.double(), t["log_prob_f64"], atol=1e-5, rtol=1e-5)
    assert torch.equal(result.prev_sample, t["prev_sample"])


@requires_shared
@pytest.mark.parametrize(("name", "index"), CASES)
def test_golden_gradient(name: str, index: int) -> None:
    case, t = golden_case(name, index)
    velocity = t["velocity"].clone().requires_grad_()
    log_prob = take(name, case, t, velocity=velocity, prev_sample=t["prev_sample"]).log_prob
    (gradient,) = torch.autograd.grad(log_prob.sum(), velocity)
    atol = 2e-7 + 2e-3 * t["grad_velocity"].abs().max().item()
    torch.testing.assert_close(gradient, t["grad_velocity"], atol=atol, rtol=0)


@requires_shared
@pytest.mark.parametrize(("name", "index"), CASES)
def test_golden_next_latent_from_given_noise(name: str, index: int) -> None:
    case, t = golden_case(name, index)
    result = take(name, case, t, noise=t["noise"])
    torch.testing.assert_close(
        result.prev_sample, t["mean"] + t["std"].reshape(-1, 1, 1, 1) * t["noise"], atol=MEAN_TOLERANCE[name], rtol=0
    )
    if case["prev_sample_from"].startswith("the same velocity"):
        torch.testing.assert_close(result.prev_sample, t["prev_sample"], atol=MEAN_TOLERANCE[name], rtol=0)


@requires_shared
@pytest.mark.parametrize(("name", "index"), CASES)
def test_golden_log_prob_in_float64(name: str, index: int) -> None:
    case, t = golden_case(name, index)
    result = take(name, case, {key: value.double() for key, value in t.items()}, prev_sample=t["prev_sample"].double())
    torch.testing.assert_close(result.log_prob, t["log_prob_f64"], atol=1e-9, rtol=1e-9)


# --- properties -------------------------------------------------------------------------------------------------------


def test_euler_step_equals_diffusers_over_a_whole_schedule() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    sigmas = sigma_schedule(6)
    expected = mine = latents(2, 4, 3, 3)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = latents(2, 4, 3, 3, seed=index + 1)
        expected = scheduler.step(velocity, timestep, expected).prev_sample
        mine = euler_step(mine, velocity, sigmas[index], sigmas[index + 1])
    assert torch.equal(mine, expected)


def test_euler_step_follows_the_linear_path_both_ways() -> None:
    x0, eps = latents(3, 2, 2, dtype=torch.float64), latents(3, 2, 2, seed=1, dtype=torch.float64)
    s = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)
    x_t = (1 - s[:, None, None]) * x0 + s[:, None, None] * eps
    torch.testing.assert_close(euler_step(x_t, eps - x0, s, 0.0), x0, atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(euler_step(x_t, eps - x0, s, 1.0), eps, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_sigma_may_be_a_float_a_scalar_tensor_or_one_per_row(step: Any) -> None:
    x, v, noise = latents(2, 3, 2, 2), latents(2, 3, 2, 2, seed=1), latents(2, 3, 2, 2, seed=2)
    forms = [(0.8, 0.5), (torch.tensor(0.8), torch.tensor(0.5)), (torch.full((2,), 0.8), torch.full((2,), 0.5))]
    results = [step(x, v, s, s_next, noise_level=0.6, noise=noise) for s, s_next in forms]
    for other in results[1:]:
        for field in ("prev_sample", "log_prob", "mean", "std"):
            assert torch.equal(getattr(results[0], field), getattr(other, field))
    assert results[0].log_prob.shape == results[0].std.shape == (2,)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_rows_with_their_own_sigma_do_not_touch_each_other(step: Any) -> None:
    x, v, noise = latents(2, 3, 2, 2), latents(2, 3, 2, 2, seed=1), latents(2, 3, 2, 2, seed=2)
    sigmas, next_sigmas = [0.9, 0.4], [0.7, 0.1]
    both = step(x, v, torch.tensor(sigmas), torch.tensor(next_sigmas), noise_level=0.6, noise=noise)
    for row in range(2):
        one = slice(row, row + 1)
        alone = step(x[one], v[one], sigmas[row], next_sigmas[row], noise_level=0.6, noise=noise[one])
        torch.testing.assert_close(both.prev_sample[one], alone.prev_sample, atol=1e-6, rtol=0)
        torch.testing.assert_close(both.log_prob[one], alone.log_prob, atol=1e-6, rtol=1e-6)


def test_without_noise_every_step_is_the_euler_step() -> None:
    x, v = latents(2, 5, dtype=torch.float64), latents(2, 5, seed=1, dtype=torch.float64)
    expected = euler_step(x, v, 0.8, 0.5)
    for step in STEPS.values():
        result = step(x, v, 0.8, 0.5, noise_level=0.0)
        torch.testing.assert_close(result.prev_sample, expected, atol=1e-12, rtol=1e-12)
        assert torch.equal(result.std, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("step", [sde_step, dance_sde_step])
def test_log_prob_is_the_mean_gaussian_log_density(step: Any) -> None:
    x, v, given = (latents(2, 3, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    result = step(x, v, 0.8, 0.5, noise_level=0.6, prev_sample=given)
    normal = torch.distributions.Normal(result.mean, result.std.reshape(2, 1, 1))
    torch.testing.assert_close(result.log_prob, normal.log_prob(given).flatten(1).mean(1), atol=1e-12, rtol=1e-12)


def test_stochastic_steps_keep_the_marginal_of_a_gaussian() -> None:
    # Data N(0, 1): x_s has variance (1-s)^2 + s^2 and v = (2s - 1) / that * x. The mean is k x, so the variance after
    # the step is k^2 var + std^2. The coefficients-preserving step is checked at a point mass, where it is exact.
    for step in (sde_step, dance_sde_step):
        for s in (0.9, 0.6, 0.3):
            h = 1e-4
            variance = (1 - s) ** 2 + s**2
            x = torch.ones(1, 1, dtype=torch.float64)
            result = step(x, x * (2 * s - 1) / variance, s, s - h, noise_level=0.7, noise=torch.zeros_like(x))
            after = result.mean.item() ** 2 * variance + result.std.item() ** 2
            rate = (after - variance) / h
            assert rate == pytest.approx(-(4 * s - 2), abs=2e-3)
    x = latents(1, 4, dtype=torch.float64)  # data are the point 0: x_s = s eps and v = eps = x / s
    result = cps_step(x, x / 0.8, 0.8, 0.5, noise_level=0.4, noise=torch.zeros_like(x))
    after = (result.mean / x) ** 2 * 0.8**2 + result.std**2
    torch.testing.assert_close(after, torch.full_like(x, 0.25), atol=1e-12, rtol=0)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_noise_comes_from_the_generator_and_has_the_stated_spread(step: Any) -> None:
    x, v = torch.zeros(2, 20_000), torch.zeros(2, 20_000)
    first = step(x, v, 0.8, 0.5, noise_level=0.6, generator=torch.Generator().manual_seed(3))
    again = step(x, v, 0.8, 0.5, noise_level=0.6, generator=torch.Generator().manual_seed(3))
    other = step(x, v, 0.8, 0.5, noise_level=0.6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first.prev_sample, again.prev_sample)
    assert not torch.equal(first.prev_sample, other.prev_sample)
    torch.testing.assert_close((first.prev_sample - first.mean).std(1), first.std, atol=0, rtol=0.03)


def test_gradient_reaches_a_new_latent_but_not_its_log_prob_through_the_latent() -> None:
    x, noise = latents(2, 5), latents(2, 5, seed=2)
    velocity = latents(2, 5, seed=1).requires_grad_()
    result = sde_step(x, velocity, 0.8, 0.5, noise_level=0.6, noise=noise)
    (by_latent,) = torch.autograd.grad(result.prev_sample.sum(), velocity, retain_graph=True)
    slope = -0.3 * (1 + 0.36 * 4 * 0.2 / 1.6)  # dt (1 + g^2 (1 - s) / (2 s)), g^2 = 0.36 * 0.8 / 0.2
    torch.testing.assert_close(by_latent, torch.full_like(x, slope), atol=1e-6, rtol=0)
    (by_log_prob,) = torch.autograd.grad(result.log_prob.sum(), velocity)
    torch.testing.assert_close(by_log_prob, slope * noise / result.std[:, None] / 5, atol=1e-5, rtol=1e-4)


def test_log_prob_of_a_new_coefficients_preserving_latent_has_a_gradient_too() -> None:
    velocity = latents(2, 5, seed=1).requires_grad_()
    noise = latents(2, 5, seed=2)
    result = cps_step(latents(2, 5), velocity, 0.8, 0.5, noise_level=0.4, noise=noise)
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), velocity)
    slope = -0.8 * 0.5 + 0.2 * math.sqrt(0.25 - result.std[0].item() ** 2)  # d mean / d v
    torch.testing.assert_close(gradient, 2 * slope * noise * result.std[:, None] / 5, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_stepped_in_float32(dtype: torch.dtype) -> None:
    x, v = latents(2, 5).to(dtype), latents(2, 5, seed=1).to(dtype)
    half = sde_step(x, v, 0.8, 0.5, noise_level=0.6, noise=latents(2, 5, seed=2))
    full = sde_step(x.float(), v.float(), 0.8, 0.5, noise_level=0.6, noise=latents(2, 5, seed=2))
    assert half.prev_sample.dtype == half.log_prob.dtype == torch.float32
    assert torch.equal(half.prev_sample, full.prev_sample)
    assert euler_step(x, v, 0.8, 0.5).dtype == torch.float32


def test_first_step_is_finite_when_the_schedule_starts_a_rounding_below_one() -> None:
    below_one = torch.tensor(1.0) - 2**-24
    assert below_one < 1
    x, v, noise = latents(2, 5), latents(2, 5, seed=1), latents(2, 5, seed=2)
    exact = sde_step(x, v, 1.0, 0.9, noise_level=0.7, sigma_max=0.95, noise=noise)
    rounded = sde_step(x, v, below_one, 0.9, noise_level=0.7, sigma_max=0.95, noise=noise)
    torch.testing.assert_close(rounded.prev_sample, exact.prev_sample, atol=1e-5, rtol=0)
    assert exact.std[0].item() == pytest.approx(0.7 * math.sqrt(1 / 0.05 * 0.1), rel=1e-5)


def test_sigma_max_matters_only_at_pure_noise() -> None:
    x, v, noise = latents(2, 5), latents(2, 5, seed=1), latents(2, 5, seed=2)
    plain = sde_step(x, v, 0.8, 0.5, noise_level=0.7, noise=noise)
    with_maximum = sde_step(x, v, 0.8, 0.5, noise_level=0.7, sigma_max=0.7, noise=noise)
    assert torch.equal(plain.prev_sample, with_maximum.prev_sample)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"velocity": torch.zeros(2, 4)}, r"sample is \[2, 3\] and velocity \[2, 4\]"),
        ({"sigma": torch.zeros(3) + 0.8}, r"sigma is \[3\]; it must be a float, 0-d or \[2\]"),
        ({"sigma_next": torch.zeros(2, 1)}, r"sigma_next is \[2, 1\]"),
        ({"sigma_next": 0.8}, "0 <= sigma_next < sigma <= 1"),
        ({"sigma": 1.5}, "0 <= sigma_next < sigma <= 1"),
        ({"sigma_next": -0.1}, "0 <= sigma_next < sigma <= 1"),
        ({"sigma": math.nan}, "0 <= sigma_next < sigma <= 1"),
        ({"noise_level": -0.1}, r"noise_level is -0\.1"),
        ({"noise_level": math.nan}, "noise_level is nan"),
        ({"noise": torch.zeros(3)}, r"noise is \[3\]; it must have the shape of sample"),
        ({"prev_sample": torch.zeros(1, 3)}, r"prev_sample is \[1, 3\]"),
    ],
)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_steps_reject_bad_arguments(step: Any, arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"velocity": X, "sigma": 0.8, "sigma_next": 0.5, "noise_level": 0.7, **arguments}
    with pytest.raises(ValueError, match=message):
        step(X, call.pop("velocity"), call.pop("sigma"), call.pop("sigma_next"), **call)


def test_coefficients_preserving_noise_level_ends_at_one() -> None:
    with pytest.raises(ValueError, match=r"noise_level is 1\.1; it must be finite and in \[0, 1\]"):
        cps_step(X, X, 0.8, 0.5, noise_level=1.1)


@pytest.mark.parametrize("sigma_max", [None, 0.0, 1.0])
def test_pure_noise_needs_a_usable_sigma_max(sigma_max: float | None) -> None:
    with pytest.raises(ValueError, match=r"sigma_max=sigmas\[1\]"):
        sde_step(X, X, 1.0, 0.9, noise_level=0.7, sigma_max=sigma_max)
