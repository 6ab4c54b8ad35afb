"""The reward protocol: what a reward is given, what it returns, and how it is configured."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, SecretStr, field_serializer
from torch import Tensor

from tiltflow.types import DTYPES, Config, Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

PROVIDED_FIELDS = ("prompt", "image", "metadata")  # those that samples made from prompts have


class RewardArguments(Config):
    """One entry of `rewards:`; `options` holds the keys that only this reward knows."""

    name: str = Field(min_length=1)
    reward_model: str
    weight: float = 1.0
    batch_size: int = Field(default=16, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    on_error: Literal["raise", "mask"] | None = None  # None: raise for local rewards, mask for remote ones
    async_reward: bool = False  # score in worker threads while sampling goes on
    num_workers: int = Field(default=1, ge=1)  # of this reward alone; only when async
    timeout: float | None = Field(default=None, gt=0)  # seconds that one call may take, or one request of a remote one
    options: Mapping[str, Any] = Field(default_factory=dict[str, Any])

    @field_serializer("options", when_used="json")
    def _show_no_secret(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, SecretStr) else value for name, value in options.items()}


@dataclass(frozen=True)
class RewardModelOutput:
    """What a reward returns for B samples.

    Example: `RewardModelOutput(torch.tensor([0.2, 0.9]), {"tag": ["colors", "position"]})`.
    """

    rewards: Tensor | Sequence[float]  # [B]; NaN marks a sample that could not be scored
    extra_info: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Any])  # key -> B values
    failures: Mapping[int, Exception] = field(default_factory=dict[int, Exception])  # place in the batch -> why


class Weights(Protocol):
    """Published weights that a reward loads."""

    @property
    def label(self) -> str:
        """What people call them."""
        ...

    def find(self) -> Path | None:
        """Return where they are on this machine, or None."""
        ...


class RewardModel(ABC):
    """What pointwise and groupwise rewards share; subclass one of those two."""

    required_fields: tuple[str, ...] = ("prompt", "image")
    use_tensor_inputs: bool = False
    remote: bool = False  # asks another process or machine, which may be out of reach
    times_itself: bool = False  # keeps to `config.timeout` by itself, request by request
    default_timeout: ClassVar[float | None] = None  # what one that times itself keeps to where the entry has none
    # What it measures, where several classes measure the same; a subclass that measures something else says so again.
    measures: ClassVar[str | None] = None
    scale_options: ClassVar[tuple[str, ...]] = ()  # own options that change the scale of the score and nothing else
    Options: ClassVar[type[Config]] = Config  # the reward's own config keys
    packages: ClassVar[tuple[str, ...]] = ()  # optional ones, imported when the reward is built
    option_packages: ClassVar[Mapping[str, str]] = {}  # own option -> optional package that is needed with it alone
    needed_options: ClassVar[tuple[str, ...]] = ()  # own options without which the reward cannot be built
    running_options: ClassVar[tuple[str, ...]] = ()  # own options that are only how it is run
    cpu_only: ClassVar[bool] = False  # computes on the CPU whatever `device` says

    @classmethod
    def how_run(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Name those of some own options that are only how the reward is run, and not what it measures.

        Args:
            options: As they stand in a config.
        """
        return cls.running_options

    def __init__(self, config: RewardArguments, accelerator: "Accelerator | None" = None):
        """Keep the config; a subclass loads its model after calling this.

        Args:
            config: The reward's entry in `rewards:`, its own options already validated.
            accelerator: The training process's accelerator, or None outside of training.
        """
        self.config = config
        self.accelerator = accelerator
        self.device = _device(config.device, accelerator)
        self.dtype = DTYPES[config.dtype]

    @property
    def options(self) -> Any:
        """The reward's own options as an instance of its `Options` class."""
        return self.Options.model_validate(dict(self.config.options))

    @classmethod
    def fields_for(cls, options: Any) -> tuple[str, ...]:
        """Return the fields that are required with some options (an instance of `Options`).

        Asked before any model is loaded; most rewards always require the same. One that does not sets its
        `required_fields` to these when it is built.
        """
        return cls.required_fields

    @classmethod
    def call_seconds(cls, config: RewardArguments) -> float | None:
        """Return how long a call of `config.batch_size` samples takes at most while those that it asks do not answer.

        Asked before the reward is built, by whoever takes a call that is longer for one that hangs.

        Args:
            config: The reward's entry, its own options already validated.

        Returns:
            Seconds that its own timeouts allow, infinity where nobody knows, or None for a reward that asks no other
            process or machine.
        """
        return math.inf if cls.remote else None

    @classmethod
    def published_weights(cls, options: Any) -> Sequence[Weights]:
        """Return the weights that are loaded with some options (an instance of `Options`); most rewards have none."""
        return ()

    @classmethod  # noqa: B027  # most rewards can score any prompt
    def check_prompt(cls, prompt: Prompt) -> None:
        """Raise a TiltflowError if a prompt can never be scored; asked before any model is loaded."""

    @classmethod
    def prompt_check(cls, options: Any) -> Callable[[Prompt], None]:
        """Return what checks prompts with some options (an instance of `Options`); for most rewards `check_prompt`."""
        return cls.check_prompt

    @abstractmethod
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score samples; receives the fields of `required_fields` by keyword and no others.

        Every field has one entry per sample. Media are PIL images (a video is a list of them, conditions are lists of
        either), or with `use_tensor_inputs` float tensors in [0, 1]: image `[C, H, W]`, video `[T, C, H, W]`,
        condition_images `[N, C, H, W]` and condition_videos `[N, T, C, H, W]`, or lists of N where sizes differ.
        Tensors are shared with other rewards: writing to one ends the scoring. A reward that requires `metadata` takes
        it as one more keyword, a list of the prompts' metadata.
        """


class PointwiseRewardModel(RewardModel):
    """Scores each sample on its own; called with batches of at most `config.batch_size` samples."""


class GroupwiseRewardModel(RewardModel):
    """Scores all samples of one prompt together; called with one whole group and batches by itself."""


def auto_device() -> str:
    """Return where what names no device computes: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(name: str, accelerator: "Accelerator | None") -> torch.device:
    if accelerator is not None and name in ("auto", accelerator.device.type):
        return accelerator.device  # with its index: worker threads would take the first GPU otherwise
    if name == "auto":
        name = auto_device()
    return torch.device(name)
