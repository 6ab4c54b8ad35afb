"""Captioned drawn scenes for pretraining, of training prompts only."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tiltflow.data.geneval import TAGS, Metadata
from tiltflow.demo.prompts import all_prompts, split_prompts
from tiltflow.demo.scenes import draw_scene, sample_scene

# How often each tag is drawn: the harder, the more often.
TAG_WEIGHTS: Final = dict(zip(TAGS, (1.0, 2.0, 2.0, 1.0, 3.0, 3.0), strict=True))


class DrawnScenes:
    """Scenes drawn on demand; the vocabulary covers every prompt, the scenes only those of the training split."""

    def __init__(self) -> None:
        self.captions: Sequence[str] = [line["prompt"] for line in all_prompts()]
        self._by_tag: dict[str, list[Metadata]] = {tag: [] for tag in TAGS}
        for line in split_prompts("train"):
            self._by_tag[line["tag"]].append(line)

    def draw(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """Draw `count` scenes.

        Returns:
            Images, uint8 `[count, 3, 64, 64]`, and their captions; the same for the same seed.
        """
        rng = np.random.default_rng(seed)
        weights = np.array([TAG_WEIGHTS[tag] for tag in TAGS])
        tags = rng.choice(len(TAGS), size=count, p=weights / weights.sum())
        images, captions = [], []
        for tag in tags:
            lines = self._by_tag[TAGS[tag]]
            line = lines[int(rng.integers(len(lines)))]
            images.append(draw_scene(sample_scene(line, rng), rng=rng))
            captions.append(line["prompt"])
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions
