"""From samples to better weights: rollouts, advantages, the training loop, and pretraining."""

from tiltflow.training.advantages import group_advantages
from tiltflow.training.rollout import SamplerConfig, rollout
from tiltflow.training.trainer import TrainConfig, Trainer

__all__ = ["SamplerConfig", "TrainConfig", "Trainer", "group_advantages", "rollout"]
