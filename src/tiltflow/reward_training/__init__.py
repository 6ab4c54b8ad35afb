"""Fits reward models, for images with text and for language, to preferences and ratings."""

from tiltflow.reward_training.preference import pickscore_criterion, preference_kl

__all__ = ["pickscore_criterion", "preference_kl"]
