"""Fits reward models, for images with text and for language, to preferences and ratings."""

from tiltflow.reward_training.base import Batch, Examples, Fitting, Shown, Totals, TrainableRewardModel
from tiltflow.reward_training.fit_config import (
    FitConfig,
    FitRunConfig,
    KeepBestConfig,
    RewardModelConfig,
    RewardModelKind,
)
from tiltflow.reward_training.image_text import (
    CLIPRewardModel,
    PickscoreRewardModel,
    RewardInferenceConfig,
    get_reward_model,
)
from tiltflow.reward_training.language import (
    REWARD_MODEL_CLASS_DICT,
    BinaryRankingRewardModel,
    RegressionRewardModel,
)
from tiltflow.reward_training.language_build import build_language
from tiltflow.reward_training.language_config import (
    LanguageDataConfig,
    LanguageModelConfig,
    LanguageRunConfig,
    RewardModelType,
)
from tiltflow.reward_training.losses import bradley_terry, masked_mse
from tiltflow.reward_training.preference import pickscore_criterion, preference_kl
from tiltflow.reward_training.trainer import FitStep, RewardTrainer

__all__ = [
    "REWARD_MODEL_CLASS_DICT",
    "Batch",
    "BinaryRankingRewardModel",
    "CLIPRewardModel",
    "Examples",
    "FitConfig",
    "FitRunConfig",
    "FitStep",
    "Fitting",
    "KeepBestConfig",
    "LanguageDataConfig",
    "LanguageModelConfig",
    "LanguageRunConfig",
    "PickscoreRewardModel",
    "RegressionRewardModel",
    "RewardInferenceConfig",
    "RewardModelConfig",
    "RewardModelKind",
    "RewardModelType",
    "RewardTrainer",
    "Shown",
    "Totals",
    "TrainableRewardModel",
    "bradley_terry",
    "build_language",
    "get_reward_model",
    "masked_mse",
    "pickscore_criterion",
    "preference_kl",
]
