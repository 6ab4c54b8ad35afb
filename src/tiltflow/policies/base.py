"""What a policy is: a generator with trainable weights, seen through velocities, prompts and images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.policies.parameters import PolicyWeights
from tiltflow.types import Conditioning


class PromptCache:
    """Prompt embeddings, each computed once; rows wait in main memory, as the encoders made them, oldest out first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._rows: dict[str, Conditioning] = {}

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Return the unique prompts that are not cached, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]

    def put(self, prompts: Sequence[str], rows: Conditioning) -> None:
        """Keep one row per prompt."""
        for index, prompt in enumerate(prompts):
            row = rows[index : index + 1]
            self._rows[prompt] = Conditioning({name: value.cpu().clone() for name, value in row.tensors.items()})

    def get(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """Return the rows of cached prompts, float32 `[B, ...]`, then drop the oldest rows beyond the capacity."""
        batch = Conditioning.cat([self._rows[prompt] for prompt in prompts])
        for prompt in list(self._rows)[: max(0, len(self._rows) - self.capacity)]:
            del self._rows[prompt]
        return Conditioning({name: value.to(device, torch.float32) for name, value in batch.tensors.items()})


class Policy(ABC):
    """A text-to-image generator; a family implements the abstract methods and is final."""

    weights: PolicyWeights
    latent_shape: tuple[int, ...]  # of one sample
    device: torch.device

    def __init__(self, *, prompt_cache_size: int = 4096):
        self._prompt_cache = PromptCache(prompt_cache_size)

    @abstractmethod
    def velocity(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return v(x_t, t, c), float32 `[B, C, h, w]`: one conditional pass with the weights in use."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Compute the embeddings of prompts, `[B, ...]`, each the same whatever the others; knows of no cache."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1], float32 `[B, 3, H, W]`, of latents x0."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """Return the sampler's decreasing times for `num_steps` steps, ending in 0, `[num_steps + 1]`."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the weights in use so that the family's stock pipeline loads them from `directory`."""

    def prepare(self, prompts: Sequence[str]) -> None:
        """Compute the embeddings that are not cached yet, all in one go."""
        missing = self._prompt_cache.missing(prompts)
        if missing:
            self._prompt_cache.put(missing, self.encode(missing))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Return the embeddings of prompts, float32 `[B, ...]`, each unique prompt computed once and cached."""
        self.prepare(prompts)
        return self._prompt_cache.get(prompts, self.device)

    def negative(self, count: int) -> Conditioning:
        """Return the embeddings of the empty prompt, `[count, ...]`."""
        return self.conditioning([""])[torch.zeros(count, dtype=torch.long, device=self.device)]
