"""Rewards: the protocol, the built-in ones, and the engine that runs them."""

from tiltflow.rewards.base import (
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardModel,
    RewardModelOutput,
)
from tiltflow.rewards.engine import RewardEngine
from tiltflow.rewards.registry import (
    REWARDS,
    build_reward,
    build_reward_model,
    check_prompts,
    check_reward,
    identity,
    reward_class,
    sealed_reward,
    shared_entries,
)
from tiltflow.rewards.remote import RemoteGroupwiseRewardModel, RemotePointwiseRewardModel

__all__ = [
    "REWARDS",
    "GroupwiseRewardModel",
    "PointwiseRewardModel",
    "RemoteGroupwiseRewardModel",
    "RemotePointwiseRewardModel",
    "RewardArguments",
    "RewardEngine",
    "RewardModel",
    "RewardModelOutput",
    "build_reward",
    "build_reward_model",
    "check_prompts",
    "check_reward",
    "identity",
    "reward_class",
    "sealed_reward",
    "shared_entries",
]
