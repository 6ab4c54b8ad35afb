"""The integration loop against its steps applied by hand, and guidance against its formula."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from tiltflow.flow import (
    Dynamics,
    StepResult,
    Trajectory,
    cps_step,
    dance_sde_step,
    euler_step,
    guided_velocity,
    sample,
    sde_step,
    sigma_schedule,
)
from tiltflow.types import Conditioning

STOCHASTIC: dict[Literal["sde", "cps", "dance"], Callable[..., StepResult]] = {
    "sde": sde_step,
    "cps": cps_step,
    "dance": dance_sde_step,
}
SIGMAS = sigma_schedule(5).double()
NOISE = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# The same numbers by another order of operations, in float64: differences are roundings of values around 1.
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def conditioning(*values: float) -> Conditioning:
    return Conditioning({"c": torch.tensor(values, dtype=torch.float64).reshape(-1, 1)})


PROMPTS, NEGATIVE = conditioning(0.5, -1.0, 2.0), conditioning(0.1, 0.2, 0.3)


class Recorder:
    """v = gain sin(x) + t c, different for every row, time and prompt; remembers what it was asked."""

    def __init__(self, gain: float = 0.8):
        self.gain = torch.tensor(gain, dtype=torch.float64, requires_grad=True)
        self.times: list[Tensor] = []  # one [B] per call

    def __call__(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert latents.shape[:1] == t.shape == (len(conditioning),)
        self.times.append(t)
        return self.gain * latents.sin() + (t[:, None] * conditioning.tensors["c"])[:, :, None]


def by_hand(
    model: Recorder, dynamics: Literal["sde", "cps", "dance"], *, noise_level: float, seed: int
) -> list[StepResult]:
    """Take the stochastic steps from NOISE one after another."""
    generator = torch.Generator().manual_seed(seed)
    results, x = list[StepResult](), NOISE
    for s, s_next in pairwise(SIGMAS.tolist()):
        velocity = model(x, torch.full((3,), s, dtype=torch.float64), PROMPTS)
        step = STOCHASTIC[dynamics]
        results.append(
            step(x, velocity, s, s_next, noise_level=noise_level, sigma_max=SIGMAS[1].item(), generator=generator)
        )
        x = results[-1].prev_sample
    return results


def run(dynamics: Dynamics, *, noise_level: float = 0.6, seed: int = 7, grad: bool = False) -> Trajectory:
    return sample(
        Recorder(),
        NOISE,
        sigmas=SIGMAS,
        conditioning=PROMPTS,
        dynamics=dynamics,
        noise_level=noise_level,
        generator=torch.Generator().manual_seed(seed),
        keep_trajectory=True,
        grad=grad,
    )


# --- dynamics ---------------------------------------------------------------------------------------------------------


def test_ode_is_the_euler_step_along_the_grid() -> None:
    model, x, states = Recorder(), NOISE, [NOISE]
    for s, s_next in pairwise(SIGMAS.tolist()):
        x = euler_step(x, model(x, torch.full((3,), s, dtype=torch.float64), PROMPTS).detach(), s, s_next)
        states.append(x)
    model = Recorder()
    trajectory = sample(model, NOISE, sigmas=SIGMAS, conditioning=PROMPTS, keep_trajectory=True)
    assert len(trajectory.states) == len(SIGMAS) and trajectory.log_probs == ()
    torch.testing.assert_close(trajectory.states, tuple(states), **EXACT)
    assert torch.equal(trajectory.latents, trajectory.states[-1])
    assert [t.tolist() for t in model.times] == [[s] * 3 for s in SIGMAS[:-1].tolist()]


def test_ode_draws_no_noise() -> None:
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    noisy = sample(
        Recorder(), NOISE, sigmas=SIGMAS, conditioning=PROMPTS, dynamics="ode", noise_level=0.6, generator=generator
    )
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(noisy.latents, sample(Recorder(), NOISE, sigmas=SIGMAS, conditioning=PROMPTS).latents)


@pytest.mark.parametrize("noise_level", [0.3, 0.9])
@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_stochastic_dynamics_are_their_step_along_the_grid(
    dynamics: Literal["sde", "cps", "dance"], noise_level: float
) -> None:
    with torch.no_grad():
        expected = by_hand(Recorder(), dynamics, noise_level=noise_level, seed=7)
    trajectory = run(dynamics, noise_level=noise_level)
    torch.testing.assert_close(trajectory.states, (NOISE, *(result.prev_sample for result in expected)), **EXACT)
    torch.testing.assert_close(trajectory.log_probs, tuple(result.log_prob for result in expected), **EXACT)
    assert torch.equal(trajectory.latents, trajectory.states[-1])
    assert all(log_prob.shape == (3,) for log_prob in trajectory.log_probs)


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_noise_comes_from_the_generator(dynamics: Dynamics) -> None:
    first = run(dynamics, seed=7)
    torch.manual_seed(1)
    assert torch.equal(run(dynamics, seed=7).latents, first.latents)
    assert not torch.equal(run(dynamics, seed=8).states[1], first.states[1])


@pytest.mark.parametrize("dynamics", ["ode", *STOCHASTIC])
def test_the_way_is_kept_only_on_request_and_changes_nothing(dynamics: Dynamics) -> None:
    kept = run(dynamics)
    plain = sample(
        Recorder(),
        NOISE,
        sigmas=SIGMAS,
        conditioning=PROMPTS,
        dynamics=dynamics,
        noise_level=0.6,
        generator=torch.Generator().manual_seed(7),
    )
    assert plain.states == plain.log_probs == ()
    assert torch.equal(plain.latents, kept.latents)
    assert torch.equal(kept.states[0], NOISE)
    assert len(kept.states) == len(SIGMAS)
    assert len(kept.log_probs) == (0 if dynamics == "ode" else len(SIGMAS) - 1)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradient_runs_through_every_step() -> None:
    """With v = a x the final x is x_1 prod(1 + dt a): its derivative by a is x_0 sum(dt / (1 + dt a))."""
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start = NOISE.clone().requires_grad_()
    latents = sample(lambda x, t, c: rate * x, start, sigmas=SIGMAS, conditioning=PROMPTS, grad=True).latents
    by_rate, by_start = torch.autograd.grad(latents.sum(), (rate, start))
    factors = [1 + 0.7 * (s_next - s) for s, s_next in pairwise(SIGMAS.tolist())]
    product = torch.tensor(factors, dtype=torch.float64).prod()
    slope = sum((s_next - s) / factor for (s, s_next), factor in zip(pairwise(SIGMAS.tolist()), factors, strict=True))
    torch.testing.assert_close(by_start, product.expand_as(NOISE), **EXACT)
    torch.testing.assert_close(by_rate, (NOISE * product * slope).sum(), **EXACT)


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_gradient_of_stochastic_dynamics_equals_that_of_the_steps(dynamics: Literal["sde", "cps", "dance"]) -> None:
    model, ours = Recorder(), Recorder()
    results = by_hand(model, dynamics, noise_level=0.6, seed=7)
    trajectory = sample(
        ours,
        NOISE,
        sigmas=SIGMAS,
        conditioning=PROMPTS,
        dynamics=dynamics,
        noise_level=0.6,
        generator=torch.Generator().manual_seed(7),
        keep_trajectory=True,
        grad=True,
    )
    for expected, found in (
        (results[-1].prev_sample, trajectory.latents),
        (torch.stack([result.log_prob for result in results]), torch.stack(trajectory.log_probs)),
    ):
        (by_steps,) = torch.autograd.grad(expected.sum(), model.gain, retain_graph=True)
        (by_sample,) = torch.autograd.grad(found.sum(), ours.gain, retain_graph=True)
        assert by_steps != 0
        torch.testing.assert_close(by_sample, by_steps, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dynamics", ["ode", *STOCHASTIC])
def test_without_grad_there_is_no_graph_and_the_mode_is_restored(dynamics: Dynamics) -> None:
    trajectory = run(dynamics, grad=False)
    assert torch.is_grad_enabled()
    assert not any(x.requires_grad for x in (trajectory.latents, *trajectory.states, *trajectory.log_probs))
    with torch.no_grad():
        assert run(dynamics, grad=True).latents.requires_grad
        assert not torch.is_grad_enabled()


# --- guidance ---------------------------------------------------------------------------------------------------------

T = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 2.0, 4.5])
def test_guidance_extrapolates_from_the_negative_to_the_conditional_velocity(scale: float) -> None:
    model = Recorder()
    guided = guided_velocity(model, NOISE, T, PROMPTS, negative=NEGATIVE, guidance_scale=scale)
    # v is linear in c: guidance on the velocities is guidance on the numbers 0.1, 0.2, 0.3 -> 0.5, -1, 2.
    mixed = conditioning(0.1 + scale * 0.4, 0.2 - scale * 1.2, 0.3 + scale * 1.7)
    torch.testing.assert_close(guided, Recorder()(NOISE, T, mixed), **EXACT)
    assert [len(t) for t in model.times] == [6]  # one pass of a doubled batch
    assert torch.equal(model.times[0], torch.cat([T, T]))


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_a_scale_of_one_is_a_single_conditional_pass(negative: Conditioning | None) -> None:
    model = Recorder()
    plain = guided_velocity(model, NOISE, T, PROMPTS, negative=negative, guidance_scale=1.0)
    assert torch.equal(plain, Recorder()(NOISE, T, PROMPTS))
    assert [len(t) for t in model.times] == [3]


def test_guidance_without_a_negative_names_the_remedy() -> None:
    message = r"guidance_scale=3\.0 needs the negative conditioning; pass it, or use 1\.0"
    with pytest.raises(ValueError, match=message):
        guided_velocity(Recorder(), NOISE, T, PROMPTS, negative=None, guidance_scale=3.0)
    with pytest.raises(ValueError, match=message):
        sample(Recorder(), NOISE, sigmas=SIGMAS, conditioning=PROMPTS, guidance_scale=3.0)


@pytest.mark.parametrize("dynamics", ["ode", *STOCHASTIC])
def test_sampling_is_guided_at_every_step(dynamics: Dynamics) -> None:
    """Guided by 3 from NEGATIVE to PROMPTS equals unguided at 0.1 + 3 x 0.4, 0.2 - 3 x 1.2 and 0.3 + 3 x 1.7."""
    model = Recorder()
    arguments = {"sigmas": SIGMAS, "dynamics": dynamics, "noise_level": 0.6, "keep_trajectory": True}
    guided = sample(
        model,
        NOISE,
        conditioning=PROMPTS,
        negative=NEGATIVE,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        **arguments,
    )
    plain = sample(
        Recorder(),
        NOISE,
        conditioning=conditioning(1.3, -3.4, 5.4),
        generator=torch.Generator().manual_seed(7),
        **arguments,
    )
    assert [len(t) for t in model.times] == [6] * 5
    torch.testing.assert_close(guided.states, plain.states, **EXACT)
    torch.testing.assert_close(guided.log_probs, plain.log_probs, **EXACT)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_sampling_without_guidance_makes_passes_of_the_batch(negative: Conditioning | None) -> None:
    model = Recorder()
    sample(model, NOISE, sigmas=SIGMAS, conditioning=PROMPTS, negative=negative, guidance_scale=1.0)
    assert [len(t) for t in model.times] == [3] * 5
