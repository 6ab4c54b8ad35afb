"""Scorers: the reward networks, differentiable to the pixels where they can be."""

from tiltflow.scorers.base import Scorer
from tiltflow.scorers.image_reward import ImageRewardScorer
from tiltflow.scorers.preprocess import clip_preprocess, hps_preprocess

__all__ = ["ImageRewardScorer", "Scorer", "clip_preprocess", "hps_preprocess"]
