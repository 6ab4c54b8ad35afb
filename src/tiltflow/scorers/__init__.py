"""Scorers: the reward networks, differentiable to the pixels where they can be."""

from tiltflow.scorers.aesthetic import AestheticScorer
from tiltflow.scorers.base import Scorer
from tiltflow.scorers.clip import ClipScorer
from tiltflow.scorers.image_reward import ImageRewardScorer
from tiltflow.scorers.language import LanguageRewardModel
from tiltflow.scorers.language_head import RewardHead
from tiltflow.scorers.language_lora import LoraSettings
from tiltflow.scorers.preprocess import clip_preprocess, hps_preprocess

__all__ = [
    "AestheticScorer",
    "ClipScorer",
    "ImageRewardScorer",
    "LanguageRewardModel",
    "LoraSettings",
    "RewardHead",
    "Scorer",
    "clip_preprocess",
    "hps_preprocess",
]
