"""What the head of a language reward model gives and how it reads."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.types import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RewardHead(Config):
    """What the head gives and reads; kept under `reward_head` in the `config.json` of the model's folder."""

    num_attributes: int = Field(default=1, ge=1)  # A
    attribute_names: tuple[str, ...] | None = None  # A, for `id2label`
    attribute_weights: tuple[float, ...] | None = None  # A; None weighs each 1 / A
    merge_attributes: bool = False  # give the weighted sum instead of the attributes
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the head's weights and of its computing
    average_pooling: bool = False  # the mean of a text's hidden states instead of the last one
    as_conversation: bool | None = None  # what it was trained on went through the chat template; None: nobody knows
    chat_template_kwargs: Mapping[str, Any] = Field(default_factory=dict[str, Any])  # that the template got

    @model_validator(mode="after")
    def _one_for_each_attribute(self) -> "RewardHead":
        for name in ("attribute_names", "attribute_weights"):
            given = getattr(self, name)
            if given is not None and len(given) != self.num_attributes:
                raise ValueError(
                    f"{name} has {len(given)} entries for num_attributes={self.num_attributes}; give one for each"
                )
        return self

    @property
    def scalar(self) -> bool:
        """Whether a text gets one number."""
        return self.num_attributes == 1 or self.merge_attributes

    def weights(self) -> Tensor:
        """Return what each attribute counts in the sum, float32 `[A]`."""
        return torch.tensor(self.attribute_weights or [1 / self.num_attributes] * self.num_attributes)
