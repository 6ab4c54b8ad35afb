"""ImageReward as a reward."""

from collections.abc import Sequence

from tiltflow.rewards.base import Weights
from tiltflow.rewards.scorer_reward import PointwiseScorerReward, ScorerOptions
from tiltflow.scorers.checkpoints import FirstOf
from tiltflow.scorers.image_reward import VOCABULARIES, WEIGHTS, ImageRewardScorer, image_reward_tokenizer


class ImageRewardReward(PointwiseScorerReward):
    """ImageReward v1.0: fit to the prompt and human preference, standardised (most images score between -2 and 2)."""

    @classmethod
    def published_weights(cls, options: ScorerOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WEIGHTS, FirstOf(VOCABULARIES))

    def load_scorer(self, options: ScorerOptions) -> ImageRewardScorer:
        """Return the network."""
        weights = WEIGHTS.require()
        return ImageRewardScorer.from_checkpoint(
            weights, image_reward_tokenizer(), device=self.device, dtype=self.dtype
        )
