"""Fits reward models, for images with text and for language, to preferences and ratings."""

from tiltflow.reward_training.base import Examples, Fitting, TrainableRewardModel
from tiltflow.reward_training.fit_config import (
    FitConfig,
    FitRunConfig,
    KeepBestConfig,
    RewardModelConfig,
    RewardModelKind,
)
from tiltflow.reward_training.trainer import FitStep, RewardTrainer

__all__ = [
    "Examples",
    "FitConfig",
    "FitRunConfig",
    "FitStep",
    "Fitting",
    "KeepBestConfig",
    "RewardModelConfig",
    "RewardModelKind",
    "RewardTrainer",
    "TrainableRewardModel",
]
