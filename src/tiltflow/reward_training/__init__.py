"""Reward training: fits the networks of rewards to what people preferred or rated."""

from tiltflow.reward_training.base import Batch, Examples, Fitting, Totals, TrainableRewardModel
from tiltflow.reward_training.language import (
    REWARD_MODEL_CLASS_DICT,
    BinaryRankingRewardModel,
    RegressionRewardModel,
    RewardModelType,
)
from tiltflow.reward_training.language_build import build_language
from tiltflow.reward_training.language_config import LanguageDataConfig, LanguageModelConfig
from tiltflow.reward_training.losses import bradley_terry, masked_mse

__all__ = [
    "REWARD_MODEL_CLASS_DICT",
    "Batch",
    "BinaryRankingRewardModel",
    "Examples",
    "Fitting",
    "LanguageDataConfig",
    "LanguageModelConfig",
    "RegressionRewardModel",
    "RewardModelType",
    "Totals",
    "TrainableRewardModel",
    "bradley_terry",
    "build_language",
    "masked_mse",
]
