"""From prompts to samples: noise of each group from its own seed, one sampling loop, decoded images."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.flow.sampling import sample
from tiltflow.policies.base import Policy
from tiltflow.runtime.randomness import generator
from tiltflow.types import Config, Prompt, SampleBatch


class SamplerConfig(Config):
    """How images are made, in rollouts or in evaluation."""

    num_steps: int = Field(default=20, ge=1)
    guidance_scale: float = 2.0
    batch_size: int = Field(default=16, ge=1)


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    groups: Sequence[int],
    group_size: int,
    sampler: SamplerConfig,
    seed: tuple[int | str, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
    submit: Callable[[SampleBatch], None] = lambda batch: None,
    keep_images: bool = True,
) -> SampleBatch:
    """Generate `group_size` samples per prompt with the weights in use.

    The initial noise of a group depends only on `seed` and the group's id: never on the batch size, the rank, or the
    groups beside it.

    Args:
        policy: The generator.
        prompts: One per group, G.
        groups: Integer id of each group, G.
        group_size: Samples per prompt.
        sampler: Steps, guidance and batch size.
        seed: (seed, *purpose); the group's id is added.
        progress: Told (samples done, samples in total) after every batch.
        submit: Given every batch as soon as it is decoded.
        keep_images: False leaves them to `submit`: the result's are `[0, 3, H, W]`.

    Returns:
        G * group_size samples, group after group.
    """
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    noise = torch.cat([group_noise(policy.latent_shape, group_size, seed=(*seed, group)) for group in groups])
    ids = torch.tensor(groups, dtype=torch.long).repeat_interleave(group_size)
    guided = sampler.guidance_scale != 1.0
    policy.prepare([*([""] if guided else []), *(prompt.text for prompt in prompts)])
    sigmas = policy.sigmas(sampler.num_steps)
    parts: list[SampleBatch] = []
    for start in range(0, len(repeated), sampler.batch_size):
        part = slice(start, start + sampler.batch_size)
        conditioning = policy.conditioning([prompt.text for prompt in repeated[part]])
        trajectory = sample(
            policy.velocity,
            noise[part].to(policy.device),
            sigmas=sigmas,
            conditioning=conditioning,
            negative=policy.negative(len(conditioning)) if guided else None,
            guidance_scale=sampler.guidance_scale,
        )
        images = policy.decode(trajectory.latents).cpu()
        batch = SampleBatch(repeated[part], ids[part], trajectory.latents, images)
        submit(batch)
        parts.append(batch if keep_images else replace(batch, images=images.new_empty((0, *images.shape[1:]))))
        progress(min(start + sampler.batch_size, len(repeated)), len(repeated))
    return SampleBatch(
        prompts=repeated,
        groups=ids,
        latents=torch.cat([batch.latents for batch in parts]),
        images=torch.cat([batch.images for batch in parts]),
    )


def group_noise(shape: tuple[int, ...], group_size: int, *, seed: tuple[int | str, ...]) -> Tensor:
    """Return the initial noise of one group, `[group_size, *shape]`, float32 on the CPU."""
    first, *rest = seed
    return torch.randn((group_size, *shape), generator=generator(int(first), *rest))
