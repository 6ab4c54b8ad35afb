"""LAION's aesthetic predictor as a reward."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from pydantic import Field

from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.scorers import AestheticScorer
from tiltflow.scorers.checkpoints import WeightsFile, WeightsFolder
from tiltflow.types import Config

HEAD: Final = WeightsFile(
    "sac+logos+ava1-l14-linearMSE.pth", page="github.com/christophschuhmann/improved-aesthetic-predictor"
)


class AestheticOptions(Config):
    """Options of the aesthetic score."""

    model_name_or_path: str = "openai/clip-vit-large-patch14"  # the CLIP network below the head
    checkpoint: str | None = None  # the head's file, if it is not the published one
    divisor: float = Field(default=1.0, gt=0)


class AestheticReward(PointwiseRewardModel):
    """The aesthetic rating, about 1 to 10 whatever the prompt, divided by `divisor`."""

    required_fields = ("image",)
    use_tensor_inputs = True
    Options = AestheticOptions

    @classmethod
    def published_weights(cls, options: AestheticOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (*(() if options.checkpoint else (HEAD,)), WeightsFolder(options.model_name_or_path))

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the network, or share the one that is loaded, and the head.

        Raises:
            RewardError: Weights are missing or do not fit.
        """
        super().__init__(config, accelerator)
        options: AestheticOptions = self.options
        head = options.checkpoint or HEAD.require()
        folder = WeightsFolder(options.model_name_or_path).require()
        self.scorer = AestheticScorer.from_files(folder, head, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Rate image tensors in [0, 1]."""
        return RewardModelOutput(self.scorer.score(image) / self.options.divisor)
