"""What the rewards have in common that are one network: loading it, and calling it."""

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field

from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModel, RewardModelOutput
from tiltflow.scorers import Scorer
from tiltflow.types import Config


class ScorerOptions(Config):
    """Options of a reward that is one network."""

    divisor: float = Field(default=1.0, gt=0)  # the score is divided by it


class ScorerReward(RewardModel):
    """A reward that is one network from `scorers/`, kept as `scorer`."""

    use_tensor_inputs = True
    Options = ScorerOptions
    scale_options = ("divisor",)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the network, or share the one that is loaded.

        Raises:
            RewardError: Weights or a vocabulary are missing or do not fit.
        """
        super().__init__(config, accelerator)
        self.scorer = self.load_scorer(self.options)

    @abstractmethod
    def load_scorer(self, options: Any) -> Scorer:
        """Return the network on `self.device` in `self.dtype`."""


class PointwiseScorerReward(ScorerReward, PointwiseRewardModel):
    """The network's score of each image and its prompt, divided by `divisor`."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score image tensors in [0, 1]; a network that reads no text gets no prompts."""
        scores = self.scorer.score(image, [""] * len(image) if prompt is None else prompt)
        return RewardModelOutput(scores / self.options.divisor)
