"""Public test doubles: a policy whose every velocity is known in closed form, and rewards that need no model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.flow.steps import sigma_schedule
from tiltflow.policies.base import Policy
from tiltflow.policies.parameters import PolicyWeights
from tiltflow.rewards.base import PointwiseRewardModel, RewardModelOutput
from tiltflow.types import Conditioning, Config

PIXELS_PER_UNIT = 0.05  # a toy latent x becomes the grey level 0.5 + 0.05 x


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return E[eps - x0 | x_t = x] for x0 ~ N(mean, std^2): the velocity of a Gaussian.

    v = (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2) * (x - (1 - t) mu) - mu.
    """
    t = t.reshape(-1, *([1] * (x.ndim - 1)))
    slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    return slope * (x - (1 - t) * mean) - mean


class ToyPolicy(Policy):
    """A generator of numbers: x0 ~ N(mean, std^2), with mean and log std as its two trainable weights.

    Example: `ToyPolicy(mean=0.0, std=1.0).weights.trainable["mean"]` is a parameter that RAM can move.
    """

    def __init__(self, *, mean: float = 0.0, std: float = 1.0, dimensions: int = 1):
        """Start from a Gaussian; it is also the reference.

        Args:
            mean: mu of every coordinate.
            std: Standard deviation of every coordinate.
            dimensions: How many independent coordinates; latents are `[B, dimensions, 1, 1]`.
        """
        super().__init__()
        self.device = torch.device("cpu")
        self.latent_shape = (dimensions, 1, 1)
        self.mean = nn.Parameter(torch.full(self.latent_shape, mean))
        self.log_std = nn.Parameter(torch.full(self.latent_shape, math.log(std)))
        self.weights = PolicyWeights({"mean": self.mean, "log_std": self.log_std})

    def velocity(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the exact velocity of the current Gaussian, `[B, D, 1, 1]`; prompts change nothing."""
        return gaussian_velocity(latents, t, self.mean, self.log_std.exp())

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the prompts' lengths, `[B, 1]`."""
        return Conditioning({"length": torch.tensor([[float(len(prompt))] for prompt in prompts])})

    def decode(self, latents: Tensor) -> Tensor:
        """Return one grey pixel 0.5 + 0.05 x per coordinate, `[B, 3, D, 1]`."""
        pixels = (0.5 + PIXELS_PER_UNIT * latents).clamp(0, 1).reshape(len(latents), 1, -1, 1)
        return pixels.expand(-1, 3, -1, -1).float()

    def sigmas(self, num_steps: int) -> Tensor:
        """Return an unshifted grid, `[num_steps + 1]`."""
        return sigma_schedule(num_steps, shift=1.0)

    def export(self, directory: Path) -> None:
        """Write mean and log std as text."""
        values = {name: parameter.flatten().tolist() for name, parameter in self.weights.trainable.items()}
        (directory / "toy.txt").write_text(repr(values))


def toy_value(image: Tensor) -> Tensor:
    """Return the number that a toy image `[3, D, 1]` shows, averaged over coordinates."""
    return (image.mean() - 0.5) / PIXELS_PER_UNIT


class _ConstantOptions(Config):
    value: float = 1.0


class ConstantReward(PointwiseRewardModel):
    """Scores everything alike."""

    use_tensor_inputs = True
    Options = _ConstantOptions

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Return `value` for every sample."""
        return RewardModelOutput(torch.full((len(prompt),), float(self.options.value)))


class _LinearOptions(Config):
    slope: float = 1.0


class LinearReward(PointwiseRewardModel):
    """r = slope * x of the toy value x."""

    use_tensor_inputs = True
    Options = _LinearOptions

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score toy images."""
        return RewardModelOutput(self.options.slope * torch.stack([toy_value(item) for item in image]))


class _QuadraticOptions(Config):
    center: float = 0.0
    scale: float = 0.5


class QuadraticReward(PointwiseRewardModel):
    """r = -scale * (x - center)^2 of the toy value x."""

    use_tensor_inputs = True
    Options = _QuadraticOptions

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score toy images."""
        values = torch.stack([toy_value(item) for item in image])
        return RewardModelOutput(-self.options.scale * (values - self.options.center).square())
