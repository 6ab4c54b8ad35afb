"""Generators: one file per family over diffusers, and the weights that are trained in them."""

from tiltflow.policies.base import Policy
from tiltflow.policies.parameters import PolicyWeights

__all__ = ["Policy", "PolicyWeights"]
