"""Small sample batches for reward tests: images whose brightness is known."""

from collections.abc import Sequence
from typing import Any

import torch

from tiltflow.rewards import RewardArguments, RewardEngine, RewardModel
from tiltflow.types import Prompt, SampleBatch


def batch(
    levels: Sequence[float], *, groups: Sequence[int] | None = None, prompts: Sequence[Prompt] | None = None
) -> SampleBatch:
    """Return one flat grey 4x4 image per level, each of its own group unless told otherwise."""
    count = len(levels)
    groups = list(range(count)) if groups is None else groups
    images = torch.tensor(levels, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    return SampleBatch(
        prompts=prompts if prompts is not None else [Prompt(f"prompt {group}", {"id": group}) for group in groups],
        groups=torch.tensor(list(groups)),
        latents=torch.zeros(count, 1, 1, 1),
        images=images,
    )


def entry(name: str = "r", reward_model: str = "tests.rewards_for_tests.Brightness", **fields: Any) -> RewardArguments:
    """Return one entry of `rewards:`."""
    return RewardArguments.model_validate({"name": name, "reward_model": reward_model, "device": "cpu", **fields})


def engine_of(cls: type[RewardModel], **fields: Any) -> RewardEngine:
    """Return an engine with one reward of a class that a test defines, named "r"."""
    return RewardEngine([entry(**fields)], factory=lambda arguments: cls(arguments))
