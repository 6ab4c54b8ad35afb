"""What a scorer is: a frozen network that gives every image, with its prompt, one number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

Images = Tensor | Sequence[Tensor]  # [B, 3, H, W], or B tensors [3, H, W] of any sizes; float in [0, 1]


class Scorer(nn.Module, ABC):
    """A reward network; subclasses are final.

    A scorer is made in eval mode and its parameters ask for no gradient: a gradient flows to the pixels, where the
    class is `differentiable`, and never into the weights. Put it back by hand to train it.
    """

    differentiable: ClassVar[bool] = False

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return the scores, float32 `[B]`.

        Args:
            images: B images in [0, 1].
            prompts: One per image; scorers that read no text ignore them.
        """

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes; a lone number, such as CLIP's logit scale, stays in float32."""
        return next(weight.dtype for weight in self.parameters() if weight.ndim)

    def freeze(self) -> None:
        """Enter eval mode and stop all gradients to the weights."""
        self.eval().requires_grad_(False)
