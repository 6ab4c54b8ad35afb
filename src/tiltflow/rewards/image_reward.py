"""ImageReward as a reward."""

from collections.abc import Sequence
from typing import Any

import torch

from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.scorers.image_reward import VOCABULARIES, WEIGHTS, ImageRewardScorer, image_reward_tokenizer
from tiltflow.types import Config


class ImageRewardReward(PointwiseRewardModel):
    """ImageReward v1.0: fit to the prompt and human preference, standardised (most images score between -2 and 2)."""

    required_fields = ("prompt", "image")
    use_tensor_inputs = True

    @classmethod
    def published_weights(cls, options: Config) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WEIGHTS, VOCABULARIES[0])

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the published weights and BERT's vocabulary.

        Raises:
            RewardError: Either is missing, or the weights do not fit the network.
        """
        super().__init__(config, accelerator)
        weights = WEIGHTS.require()
        self.scorer = ImageRewardScorer.from_checkpoint(
            weights, image_reward_tokenizer(), device=self.device, dtype=self.dtype
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score images `[3, H, W]` in [0, 1] against their prompts."""
        return RewardModelOutput(self.scorer.score(image, prompt))
