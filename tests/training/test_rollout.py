"""Rollouts of a toy policy that follows its prompts: guidance, noise of each group, order, and what is returned."""

import pytest
import torch

from tiltflow.testing import ToyPolicy, gaussian_velocity
from tiltflow.training import SamplerConfig, rollout
from tiltflow.training.rollout import group_noise
from tiltflow.types import Prompt

PROMPTS = [Prompt("a"), Prompt("bbb")]


class PromptedPolicy(ToyPolicy):
    """Makes x0 ~ N(1 + length of the prompt, 1), thus N(1, 1) of the empty one; remembers the passes."""

    def __init__(self):
        super().__init__(mean=1.0, std=1.0, dimensions=2)
        self.passes = []  # times [B] of each

    def velocity(self, latents, t, conditioning):
        self.passes.append(t)
        length = conditioning.tensors["length"].reshape(-1, 1, 1, 1)
        return gaussian_velocity(latents, t, self.mean + length, self.log_std.exp())


def roll(policy, prompts=PROMPTS, *, groups=(4, 9), seed=(0, "rollout"), steps=5, scale=2.5, batch_size=6, **options):
    sampler = SamplerConfig(num_steps=steps, guidance_scale=scale, batch_size=batch_size)
    return rollout(policy, prompts, groups=groups, group_size=3, sampler=sampler, seed=seed, **options)


def integrate(noise, mean, sigmas):
    """Take Euler steps along the velocity of N(mean, 1)."""
    x = noise
    for s, s_next in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        x = x + (s_next - s) * gaussian_velocity(x, torch.full((len(x),), s), mean, torch.tensor(1.0))
    return x


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_extrapolates_from_the_empty_prompt(scale):
    """v is linear in the mean, so a scale w makes N(1 + w length, 1), and of the empty prompt alone N(1, 1)."""
    policy = PromptedPolicy()
    samples = roll(policy, scale=scale)
    noise = torch.cat([group_noise((2, 1, 1), 3, seed=(0, "rollout", group)) for group in (4, 9)])
    means = 1 + scale * torch.tensor([1.0] * 3 + [3.0] * 3).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(samples.latents, integrate(noise, means, policy.sigmas(5)), rtol=0, atol=1e-5)


def test_guidance_costs_a_doubled_batch_and_no_guidance_a_plain_one():
    guided, plain = PromptedPolicy(), PromptedPolicy()
    roll(guided, scale=2.5, batch_size=4)
    roll(plain, scale=1.0, batch_size=4)
    assert [len(t) for t in guided.passes] == [8] * 5 + [4] * 5
    assert [len(t) for t in plain.passes] == [4] * 5 + [2] * 5


def test_every_step_of_the_samplers_grid_is_taken():
    policy = PromptedPolicy()
    roll(policy, steps=3, scale=1.0)
    assert [t.tolist() for t in policy.passes] == [[s] * 6 for s in policy.sigmas(3)[:-1].tolist()]


def test_samples_come_group_after_group_with_their_images():
    policy = PromptedPolicy()
    samples = roll(policy)
    assert [prompt.text for prompt in samples.prompts] == ["a"] * 3 + ["bbb"] * 3
    assert samples.groups.tolist() == [4] * 3 + [9] * 3 and samples.groups.dtype == torch.long
    assert samples.latents.shape == (6, 2, 1, 1) and not samples.latents.requires_grad
    assert samples.images.shape == (6, 3, 2, 1) and samples.images.dtype == torch.float32
    assert torch.equal(samples.images, policy.decode(samples.latents))


def test_a_group_is_the_same_whatever_the_batches_and_its_neighbours():
    together = roll(PromptedPolicy(), batch_size=6)
    apart = roll(PromptedPolicy(), batch_size=1)
    torch.testing.assert_close(apart.latents, together.latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(apart.images, together.images, rtol=0, atol=1e-6)
    alone = roll(PromptedPolicy(), PROMPTS[1:], groups=(9,), batch_size=2)
    torch.testing.assert_close(alone.latents, together.latents[3:], rtol=0, atol=1e-6)


def test_noise_differs_between_samples_groups_seeds_and_purposes():
    seeds = [(0, "rollout", 4), (0, "rollout", 9), (1, "rollout", 4), (0, "evaluation", 4)]
    noise = torch.cat([group_noise((2, 1, 1), 3, seed=seed) for seed in seeds])
    assert noise.unique().numel() == noise.numel() == 24
    assert torch.equal(group_noise((2, 1, 1), 3, seed=seeds[0]), noise[:3])
    assert not torch.equal(roll(PromptedPolicy(), seed=(1, "rollout")).latents, roll(PromptedPolicy()).latents)


def test_initial_noise_is_standard_normal():
    """The mean of 40,000 draws is within 5 of its standard errors, 0.005; so is the std, of error 0.0035."""
    noise = group_noise((10_000, 2, 2), 1, seed=(0, "rollout", 4))
    assert noise.mean().item() == pytest.approx(0.0, abs=0.025)
    assert noise.std().item() == pytest.approx(1.0, abs=0.018)


def test_rollout_uses_the_weights_in_use():
    policy, other = PromptedPolicy(), PromptedPolicy()
    with torch.no_grad():
        other.mean.fill_(-2.0)
    before = roll(policy).latents
    assert not torch.equal(roll(other).latents, before)
    with torch.no_grad(), other.weights.using("old"):
        assert torch.equal(roll(other).latents, before)


def test_progress_is_told_after_every_batch():
    told = []
    roll(PromptedPolicy(), batch_size=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
