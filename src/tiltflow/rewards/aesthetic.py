"""LAION's aesthetic predictor as a reward."""

from collections.abc import Sequence
from typing import Final

from tiltflow.rewards.base import Weights
from tiltflow.rewards.scorer_reward import PointwiseScorerReward, ScorerOptions
from tiltflow.scorers import AestheticScorer
from tiltflow.scorers.checkpoints import WeightsFile, WeightsFolder
from tiltflow.types import PathText, PathTextOrNone

HEAD: Final = WeightsFile(
    "sac+logos+ava1-l14-linearMSE.pth", page="github.com/christophschuhmann/improved-aesthetic-predictor"
)


class AestheticOptions(ScorerOptions):
    """Options of the aesthetic score."""

    model_name_or_path: PathText = "openai/clip-vit-large-patch14"  # the CLIP network below the head
    checkpoint: PathTextOrNone = None  # the head's file, if it is not the published one


class AestheticReward(PointwiseScorerReward):
    """The aesthetic rating, about 1 to 10 whatever the prompt, divided by `divisor`."""

    required_fields = ("image",)
    Options = AestheticOptions

    @classmethod
    def published_weights(cls, options: AestheticOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (*(() if options.checkpoint else (HEAD,)), WeightsFolder(options.model_name_or_path))

    def load_scorer(self, options: AestheticOptions) -> AestheticScorer:
        """Return the network and its head."""
        head = options.checkpoint or HEAD.require()
        folder = WeightsFolder(options.model_name_or_path).require()
        return AestheticScorer.from_files(folder, head, device=self.device, dtype=self.dtype)
