"""Small pairs of images and small models for the tests of image-text reward models."""

from typing import Any

import torch
from torch import Tensor

from tests.scorers.tiny_clip import tiny_backbone
from tiltflow.reward_training import CLIPRewardModel, PickscoreRewardModel

PROMPTS = ["cat", "a red dog", "dog cat dog", "red", "a cat"]
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.7, 0.3], [0.0, 1.0]])


def levels(count: int, *, seed: int = 0, height: int = 40, width: int = 48) -> Tensor:
    """Return random images `[count, H, W, 3]`, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator).to(torch.uint8)


def pair_batch(count: int = 5, **changes: Any) -> dict[str, Any]:
    """Return a batch of pairs whose images have several sizes."""
    batch: dict[str, Any] = {
        "img_0": [levels(1, seed=place, height=30 + place)[0] for place in range(count)],
        "img_1": [levels(1, seed=100 + place, width=50 - place)[0] for place in range(count)],
        "prompt": PROMPTS[:count],
        "label": LABELS[:count],
        "weight": torch.ones(count),
        "skipped": torch.zeros(count),
    }
    return batch | changes


def rows_of(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Return some rows of a batch."""
    return {key: value[rows] for key, value in batch.items()}


def tiny_model(*, in_batch_negatives: float = 0.0, seed: int = 1, **options: bool) -> CLIPRewardModel:
    """Return a random small model, in training mode."""
    towers = PickscoreRewardModel(tiny_backbone(seed=seed), **options)
    return CLIPRewardModel(towers, in_batch_negatives=in_batch_negatives)
