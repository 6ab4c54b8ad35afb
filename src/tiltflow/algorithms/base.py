"""What every algorithm is: a config, the random numbers it draws for a batch, and a loss on velocities.

The trainer owns the loop (rollout, reward, advantage, accumulate, step); an algorithm says which noised points of a
sample it looks at and what the network should answer there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltflow.flow.sampling import VelocityModel
from tiltflow.types import Conditioning, LossOutput

Snapshot = Literal["ref", "old", "ema"]


@dataclass(frozen=True)
class NoisedBatch:
    """Points on the path between samples and noise: rows of one update, several per sample."""

    x0: Tensor  # [M, C, h, w]
    eps: Tensor  # [M, C, h, w]
    t: Tensor  # [M] in (0, 1]
    advantages: Tensor  # [M] float32
    conditioning: Conditioning  # [M, ...]

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: slice) -> "NoisedBatch":
        return NoisedBatch(self.x0[rows], self.eps[rows], self.t[rows], self.advantages[rows], self.conditioning[rows])


@dataclass(frozen=True)
class Velocities:
    """The policy as a loss sees it: its velocity now, and a way to ask named snapshots of its weights."""

    current: VelocityModel
    using: Callable[[Snapshot], AbstractContextManager[None]]

    def of(self, snapshot: Snapshot, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity of a snapshot without gradient, `[M, ...]`."""
        with torch.no_grad(), self.using(snapshot):
            return self.current(latents, t, conditioning)


class Algorithm(ABC):
    """A post-training algorithm; final classes implement the three methods."""

    metric_names: ClassVar[tuple[str, ...]]  # what `loss` reports beside the loss, in a fixed order

    @abstractmethod
    def noise(
        self,
        latents: Tensor,
        advantages: Tensor,
        conditioning: Conditioning,
        *,
        sigmas: Tensor,
        generator: torch.Generator,
    ) -> NoisedBatch:
        """Draw the noised points of the samples of one prompt.

        Args:
            latents: x0, `[B, C, h, w]`.
            advantages: `[B]`.
            conditioning: The prompt's one row, `[1, ...]`.
            sigmas: The sampler's time grid, `[N + 1]`.
            generator: The only source of randomness.
        """

    @abstractmethod
    def loss(self, batch: NoisedBatch, policy: Velocities) -> LossOutput:
        """Return the mean loss over the rows of `batch`; metrics are means over the same rows."""

    @abstractmethod
    def old_decay(self, epoch: int) -> float:
        """Return d of `old <- d old + (1 - d) theta` after the update of `epoch`, counted from 1."""
