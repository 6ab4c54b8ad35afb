"""Rewards over HTTP; importing this room needs neither torch nor a model library."""

from tiltflow.serving.server import RewardServer

__all__ = ["RewardServer"]
