"""Frozen batched records that travel between rooms, and the base of every config class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import expanduser
from typing import Annotated, Any, Final

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor


class Config(BaseModel):
    """Base of every config class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# What configs call the kinds of numbers: rewards and language models by the long names, image generators by the short.
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def in_home(text: Any) -> Any:
    """Return a path with `~` at its beginning as the home folder, and any other value as it is."""
    return expanduser(text) if isinstance(text, str) else text


PathText = Annotated[str, AfterValidator(in_home)]  # of a file or folder, or a name of something else
PathTextOrNone = Annotated[str | None, AfterValidator(in_home)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # a decay rate of Adam's moments


@dataclass(frozen=True)
class Prompt:
    """What to generate, and what a reward needs to know about it.

    Example: `Prompt("a photo of a red circle", {"tag": "colors", "include": [...]})`.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings of one batch, under the names that the policy's network knows.

    Every tensor has the batch first: `{"encoder_hidden_states": [B, L, D], "pooled_projections": [B, P]}`.
    """

    tensors: Mapping[str, Tensor]  # each [B, ...]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> "Conditioning":
        """Select rows, by slice or by an integer tensor `[N]` (which may repeat rows)."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> "Conditioning":
        """Return a single row as `count` rows of one memory."""
        return Conditioning({name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenate batches of the same policy."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class SampleBatch:
    """Generated samples of whole prompt groups, in group order.

    Example: 2 prompts x 3 samples give `groups = [7, 7, 7, 8, 8, 8]` and six rows everywhere.
    """

    prompts: Sequence[Prompt]  # B
    groups: Tensor  # [B] int64, unique over all ranks of one epoch
    latents: Tensor  # [B, C, h, w], x0 in the policy's latent space
    images: Tensor  # [B, 3, H, W] in [0, 1], float32 on the CPU

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RewardFailure:
    """Why some samples have no score from one reward: a value, never a fake zero."""

    reward: str
    samples: tuple[int, ...]  # rows of the table
    kind: str  # "length", "not finite", "timeout" or "unparsable"; else the type of the exception
    message: str


@dataclass(frozen=True)
class RewardTable:
    """Scores of B samples under R rewards; a missing score is NaN and has a failure that tells why.

    Example: `RewardTable(("geneval", "ocr"), torch.tensor([[0.5, 1.0], [1.0, float("nan")]]), failures=(...))`.
    """

    names: tuple[str, ...]  # R
    scores: Tensor  # [B, R] float32
    failures: tuple[RewardFailure, ...] = ()
    extra_info: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict[str, Any])  # reward -> key -> B

    def column(self, name: str) -> Tensor:
        """Return one reward's scores, `[B]`."""
        return self.scores[:, self.names.index(name)]


@dataclass(frozen=True)
class ScoredBatch:
    """Samples with their advantages: what an algorithm learns from.

    It carries prompts, not their embeddings: those are megabytes each in a large model, and cached by the policy.
    """

    prompts: Sequence[Prompt]  # B
    latents: Tensor  # [B, C, h, w]
    advantages: Tensor  # [B] float64
    groups: Tensor  # [B] int64

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class LossOutput:
    """A loss to descend and what to log beside it."""

    loss: Tensor  # scalar
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # scalars, detached
