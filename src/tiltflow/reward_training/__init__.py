"""Fits reward models, for images with text and for language, to preferences and ratings."""

from tiltflow.reward_training.image_text import (
    CLIPRewardModel,
    PickscoreRewardModel,
    RewardInferenceConfig,
    get_reward_model,
)
from tiltflow.reward_training.preference import pickscore_criterion, preference_kl

__all__ = [
    "CLIPRewardModel",
    "PickscoreRewardModel",
    "RewardInferenceConfig",
    "get_reward_model",
    "pickscore_criterion",
    "preference_kl",
]
