"""RAM against the golden numbers and against distributions whose tilt is known in closed form."""

import math

import numpy as np
import pytest
import torch

from tests.shared import case_tensors, golden, requires_shared
from tiltflow.algorithms import RAM, NoisedBatch, RAMConfig, Velocities, ram_loss, ram_target
from tiltflow.data import PromptStream
from tiltflow.flow import sigma_schedule
from tiltflow.rewards import RewardArguments, RewardEngine
from tiltflow.runtime.distributed import Distributed
from tiltflow.testing import ToyPolicy, gaussian_velocity
from tiltflow.training import SamplerConfig, TrainConfig, Trainer
from tiltflow.types import Conditioning, Prompt


@requires_shared
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_target_loss_and_gradient(index, dtype):
    meta, tensors = golden("algorithms/ram_target")
    case, t = meta["cases"][index], case_tensors(tensors, index)
    copies = case["noisings_per_endpoint"]
    inputs = {key: value.to(dtype) for key, value in t.items()}
    target = ram_target(
        inputs["v_ref"],
        inputs["v_old"],
        inputs["x0"].repeat_interleave(copies, dim=0),
        inputs["eps"],
        inputs["advantages"].repeat_interleave(copies),
        reward_multiplier=case["rho"],
    )
    v_theta = inputs["v_theta"].clone().requires_grad_()
    loss = ram_loss(v_theta, target)
    loss.backward()
    tight = dtype == torch.float64
    scale = t["target"].abs().max().item()
    assert not target.requires_grad
    torch.testing.assert_close(target.double(), t["target"], rtol=0, atol=scale * (1e-12 if tight else 1e-6))
    torch.testing.assert_close(loss.detach().double(), t["loss"], rtol=1e-12 if tight else 1e-5, atol=0)
    grad_scale = t["grad_v_theta"].abs().max().item()
    torch.testing.assert_close(
        v_theta.grad.double(), t["grad_v_theta"], rtol=0, atol=grad_scale * (1e-12 if tight else 1e-5)
    )


def test_target_stops_every_gradient():
    tensors = [torch.randn(4, 2, requires_grad=True) for _ in range(4)]
    assert not ram_target(*tensors, torch.ones(4, requires_grad=True), reward_multiplier=3.0).requires_grad


def posterior(x, t, mean, var, nodes=40):
    """Return Gauss-Hermite nodes of x0 | x_t = x for x0 ~ N(mean, var): values `[len(x), nodes]` and weights."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    total = (1 - t) ** 2 * var + t**2
    center = mean + (1 - t) * var / total * (x - (1 - t) * mean)
    spread = math.sqrt(var * t**2 / total)
    x0 = torch.as_tensor(center)[:, None] + spread * torch.as_tensor(z)[None]
    return x0, torch.as_tensor(weights / weights.sum())


def expected_target(x, t, *, mean, var, v_ref, v_old, reward):
    """Return E[ram_target | x_t = x] exactly, for x0 ~ N(mean, var) and m = 1."""
    x0, weights = posterior(x, t, mean, var)
    eps = (torch.as_tensor(x)[:, None] - (1 - t) * x0) / t
    rows = x0.reshape(-1, 1)
    repeat = lambda v: torch.as_tensor(v)[:, None].expand_as(x0).reshape(-1, 1)  # noqa: E731
    target = ram_target(
        repeat(v_ref), repeat(v_old), rows, eps.reshape(-1, 1), reward(rows.flatten()), reward_multiplier=1.0
    )
    return (target.reshape(x0.shape) * weights).sum(dim=1)


X = np.linspace(-2, 2, 9)


def velocity(x, t, mean, var):
    times = torch.full((len(x),), t, dtype=torch.float64)
    std = torch.tensor(math.sqrt(var), dtype=torch.float64)
    return gaussian_velocity(torch.as_tensor(x)[:, None], times, torch.tensor(mean, dtype=torch.float64), std).flatten()


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_linear_reward_has_the_tilted_gaussian_as_its_exact_fixed_point(t):
    """N(mu, s^2) tilted by exp(a x) is N(mu + a s^2, s^2), and there the target's mean is the velocity itself."""
    mu, var, slope = 0.3, 0.7, 1.1
    tilted = mu + slope * var
    v_star = velocity(X, t, tilted, var)
    target = expected_target(
        X, t, mean=tilted, var=var, v_ref=velocity(X, t, mu, var), v_old=v_star, reward=lambda x: slope * x
    )
    torch.testing.assert_close(target, v_star, rtol=0, atol=1e-10)


def test_quadratic_reward_shows_the_known_bias():
    """N(0, 1) with r = -x^2/2: the tilted velocity at t = 1/2 is 2x/3, RAM's right-hand side there is 4x/9."""
    v_star = velocity(X, 0.5, 0.0, 0.5)
    torch.testing.assert_close(v_star, torch.as_tensor(2 * X / 3), rtol=0, atol=1e-12)
    target = expected_target(
        X, 0.5, mean=0.0, var=0.5, v_ref=velocity(X, 0.5, 0.0, 1.0), v_old=v_star, reward=lambda x: -(x**2) / 2
    )
    torch.testing.assert_close(target, torch.as_tensor(4 * X / 9), rtol=0, atol=1e-10)


def test_a_constant_changes_nothing_for_a_self_consistent_velocity_and_something_for_another():
    common = {"mean": 0.4, "var": 0.6, "v_ref": velocity(X, 0.5, 0.0, 1.0)}
    consistent = velocity(X, 0.5, 0.4, 0.6)
    plain = expected_target(X, 0.5, **common, v_old=consistent, reward=lambda x: torch.sin(x))
    shifted = expected_target(X, 0.5, **common, v_old=consistent, reward=lambda x: torch.sin(x) + 5)
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-10)
    other = consistent + 0.1
    moved = expected_target(X, 0.5, **common, v_old=other, reward=lambda x: torch.sin(x) + 5)
    still = expected_target(X, 0.5, **common, v_old=other, reward=lambda x: torch.sin(x))
    torch.testing.assert_close(moved - still, torch.full((9,), -0.5, dtype=torch.float64), rtol=0, atol=1e-10)


def toy_trainer(policy, reward, *, epochs, multiplier=0.5, lr=0.03, seed=0, steps=20):
    argument = RewardArguments(name="r", reward_model=f"tiltflow.testing.{reward}")
    return Trainer(
        policy,
        RAM(RAMConfig(reward_multiplier=multiplier, num_noisings=8)),
        RewardEngine([argument]),
        PromptStream([Prompt("a"), Prompt("bb")], seed=seed),
        config=TrainConfig(
            epochs=epochs, num_prompts_per_epoch=4, group_size=128, batch_size=1024, lr=lr, weight_decay=0.0
        ),
        sampler=SamplerConfig(num_steps=steps, guidance_scale=1.0, batch_size=512),
        seed=seed,
        distributed=Distributed(),
    )


def test_ram_moves_the_toy_policy_to_the_tilted_gaussian():
    """A normalised advantage of slope 1/s and m = 0.5 tilt N(0, 1) to N(0.5, 1): the mean moves, the std does not."""
    policy = ToyPolicy(mean=0.0, std=1.0)
    for _ in toy_trainer(policy, "LinearReward", epochs=150).run():
        pass
    with torch.no_grad(), policy.weights.using("ema"):
        assert policy.mean.item() == pytest.approx(0.5, abs=0.06)
        assert policy.log_std.exp().item() == pytest.approx(1.0, abs=0.06)


def quadratic_fixed_point(multiplier, *, ram, steps, low=0.4, high=1.0):
    """Return the std of a centred Gaussian policy at which training on r = -x^2/2 stands still, reference N(0, 1).

    Args:
        multiplier: m; the advantage is the reward standardised under the policy itself.
        steps: Of the time grid.
        ram: Whether the policy follows RAM's expected target, or the velocity of the law tilted by that advantage.
    """
    sigmas = sigma_schedule(steps, shift=1.0)[:-1].double()
    z, weights = np.polynomial.hermite_e.hermegauss(40)

    def pull(std):
        var = std**2
        slope = multiplier / (var / math.sqrt(2))  # m over the std of x^2/2 under N(0, var)
        tilted = 1 / (1 + slope)
        total = 0.0
        for t in sigmas.tolist():
            x = z * math.sqrt((1 - t) ** 2 * var + t**2)
            v = velocity(x, t, 0.0, var)
            goal = velocity(x, t, 0.0, tilted)
            if ram:
                goal = expected_target(
                    x,
                    t,
                    mean=0.0,
                    var=var,
                    v_ref=velocity(x, t, 0.0, 1.0),
                    v_old=v,
                    reward=lambda x0: slope * (var - x0**2) / 2,
                )
            change = velocity(x, t, 0.0, (std + 1e-4) ** 2) - velocity(x, t, 0.0, (std - 1e-4) ** 2)
            total += t * float((torch.as_tensor(weights / weights.sum()) * (v - goal) * change).sum())
        return total

    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if pull(middle) < 0 else (low, middle)
    return (low + high) / 2


def test_ram_on_the_quadratic_reward_stops_where_its_bias_says():
    """Trained, the policy narrows to RAM's own fixed point, which is not the tilted Gaussian: the bias shows."""
    expected, tilted = (quadratic_fixed_point(0.35, ram=ram, steps=80) for ram in (True, False))
    assert tilted == pytest.approx(math.sqrt(1 - 0.35 * math.sqrt(2)), abs=1e-6)
    policy = ToyPolicy(mean=0.0, std=1.0)
    for _ in toy_trainer(policy, "QuadraticReward", epochs=150, multiplier=0.35, steps=80).run():
        pass
    with torch.no_grad(), policy.weights.using("ema"):
        found = policy.log_std.exp().item()
    print(f"RAM's fixed point {expected:.3f}, tilted {tilted:.3f}, trained {found:.3f}")
    assert found == pytest.approx(expected, abs=0.02)
    assert abs(expected - tilted) > 0.05


def test_a_constant_reward_leaves_the_toy_policy_at_its_reference():
    policy = ToyPolicy(mean=0.2, std=0.9)
    for _ in toy_trainer(policy, "ConstantReward", epochs=5).run():
        pass
    assert policy.mean.item() == pytest.approx(0.2, abs=1e-6)
    assert policy.log_std.exp().item() == pytest.approx(0.9, abs=1e-6)


def test_noise_repeats_each_sample_k_times_on_the_grid():
    ram = RAM(RAMConfig(num_noisings=5))
    latents = torch.arange(3.0).reshape(3, 1, 1, 1)
    sigmas = torch.tensor([1.0, 0.6, 0.2, 0.0])
    batch = ram.noise(
        latents,
        torch.tensor([0.1, 0.2, 0.3]),
        Conditioning({"c": torch.tensor([[7.0]])}),
        sigmas=sigmas,
        generator=torch.Generator().manual_seed(0),
    )
    assert batch.x0.flatten().tolist() == [0.0] * 5 + [1.0] * 5 + [2.0] * 5
    assert batch.conditioning.tensors["c"].flatten().tolist() == [7.0] * 15
    assert batch.advantages[[0, 5, 14]].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert set(batch.t.tolist()) <= set(sigmas[:-1].tolist())
    assert batch.eps.unique().numel() == 15


def test_loss_and_metrics_by_hand_with_theta_old_ema_and_ref_all_different():
    """Two rows of a Gaussian of std 1 and mean mu, whose velocity is -mu at t = 1/2 and -0.8 x - 0.4 mu at t = 1/4.

    With m = 2 and mu = 1 (theta), -0.5 (old), 0.25 (ref), 4 (ema, which has no part):

        t     x0   eps   x_t    A       v_theta   v_old   v_ref   target                              v_theta - target
        1/2   -1   0.5   -0.25  -0.75   -1        0.5     -0.25   -0.25 - 1.5 (1.5 - 0.5) = -1.75      0.75
        1/4    1   3      1.5    0.5    -1.6      -1      -1.3    -1.3 + 1 (2 + 1) = 1.7              -3.3
    """
    policy = ToyPolicy(mean=0.25, std=1.0)
    means = {"theta.mean": 1.0, "old.mean": -0.5, "ema.mean": 4.0}
    values = {name: torch.full(policy.latent_shape, value) for name, value in means.items()}
    policy.weights.load_state(policy.weights.state() | values)
    rows = {"x0": [-1.0, 1.0], "eps": [0.5, 3.0]}
    batch = NoisedBatch(
        **{name: torch.tensor(row).reshape(2, 1, 1, 1) for name, row in rows.items()},
        t=torch.tensor([0.5, 0.25]),
        advantages=torch.tensor([-0.75, 0.5]),
        conditioning=policy.conditioning(["a", "bb"]),
    )
    output = RAM(RAMConfig(reward_multiplier=2.0)).loss(batch, Velocities(policy.velocity, policy.weights.using))
    assert output.loss.item() == pytest.approx((0.75**2 + 3.3**2) / 2, rel=1e-6)
    assert set(output.metrics) == set(RAM.metric_names)
    assert output.metrics["drift"].item() == pytest.approx((0.75**2 + 0.3**2) / 2, rel=1e-6)
    assert output.metrics["target_scale"].item() == pytest.approx((1.75**2 + 1.7**2) / 2, rel=1e-6)
    assert not any(value.requires_grad for value in output.metrics.values())
    output.loss.backward()
    # d v_theta / d mu is -1 and -0.4; no other velocity has a gradient.
    assert policy.mean.grad.item() == pytest.approx((2 * 0.75 * -1 + 2 * -3.3 * -0.4) / 2, rel=1e-5)
    state = policy.weights.state()
    assert {name: state[name].item() for name in means} == means


def test_lagged_policy_schedule():
    ram = RAM(RAMConfig())
    assert [ram.old_decay(epoch) for epoch in (1, 50, 90, 500)] == [0.01, 0.5, 0.9, 0.9]


def test_loss_asks_ref_old_and_theta_without_guidance():
    policy = ToyPolicy(mean=0.0, std=1.0)
    policy.weights.follow("old", decay=1.0)
    with torch.no_grad():
        policy.mean.fill_(0.3)
    asked = []

    def velocity_of(latents, t, conditioning):
        asked.append((len(latents), torch.is_grad_enabled()))
        return policy.velocity(latents, t, conditioning)

    ram = RAM(RAMConfig(num_noisings=2))
    conditioning = Conditioning({"length": torch.zeros(1, 1)})
    batch = ram.noise(
        torch.randn(4, 1, 1, 1),
        torch.randn(4),
        conditioning,
        sigmas=policy.sigmas(5),
        generator=torch.Generator().manual_seed(1),
    )
    output = ram.loss(batch, Velocities(velocity_of, policy.weights.using))
    assert asked == [(8, False), (8, False), (8, True)]
    assert output.metrics["drift"].item() > 0
