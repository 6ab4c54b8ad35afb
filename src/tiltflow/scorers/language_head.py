"""What the head of a language reward model gives and how it reads."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import ConfigError
from tiltflow.types import Config


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


def reward_attribute(head: RewardHead, names: Sequence[str], asked: str | None, *, option: str) -> int | None:
    """Return which of a head's numbers is the reward; None: the only one, or their weighted sum.

    Args:
        head: Of the model.
        names: Of its A numbers.
        asked: The name of one, or its number from 0.
        option: What the user set, for the message of an error.

    Raises:
        ConfigError: There is none of that name; or there are several, and nothing says which is the reward.
    """
    told = ", ".join(names)
    if asked is not None:
        if asked not in (*names, *map(str, range(head.num_attributes))):
            raise ConfigError(f"{option} {asked}: the model gives {told}; give a name or a number")
        return names.index(asked) if asked in names else int(asked)
    if not head.scalar and head.attribute_weights is None:
        raise ConfigError(
            f"the model gives {head.num_attributes} numbers ({told}): say which is the reward with {option}, or keep "
            "attribute_weights in its head"
        )
    return None
