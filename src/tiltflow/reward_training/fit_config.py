"""How a reward model is trained, and what the config of such a run holds beside that."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tiltflow.errors import ConfigError
from tiltflow.reward_training.base import Fitting
from tiltflow.runtime.tracking import TrackingConfig
from tiltflow.types import Beta, Config, in_home

Steps = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class KeepBestConfig(Config):
    """Which of the validated models are kept."""

    metric: str = "validation/loss"  # with several validation sets `validation_<name>/loss`
    mode: Literal["min", "max"] = "min"
    count: int = Field(default=1, ge=1)


class FitConfig(Config):
    """How a reward model is trained; batch sizes are totals over all processes, micro-batches belong to one."""

    max_steps: int | None = Field(default=None, ge=1)
    max_epochs: int | None = Field(default=1, ge=1)  # whichever of the two is reached first; None: no limit
    max_seconds: float | None = Field(default=None, gt=0)  # of one start: then validate, save and end
    batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)  # rows of one forward pass; None: all of a process
    max_tokens: int | None = Field(default=None, ge=1)  # of one forward pass with padding; a pair is two texts
    length_window: int = Field(default=50, ge=0)  # batches in which examples of like lengths are put together
    shuffle: bool = True  # another order each epoch; false: that of the data
    lr: float = Field(default=1e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)  # of weights; vectors and scalars have none
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    # At min_lr, at the end; None: a tenth of the run, at most 1,000.
    constant_steps: int | None = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights and optimizer stay as they are
    gradient_checkpointing: bool = False
    validate_every: Steps | Fraction | None = None  # steps, or 0.25 for a quarter of an epoch; None: at the end
    validate_at_start: bool = False
    limit_validation_batches: int | None = Field(default=None, ge=1)  # of each set: the same ones each time
    save_every: int | None = Field(default=None, ge=1)  # steps; None: at the end
    keep: int = Field(default=2, ge=1)  # checkpoints to resume from
    keep_best: KeepBestConfig | None = None  # None: the run's model is the last one
    workers: int = Field(default=2, ge=0)  # threads that read and decode ahead; 0: none
    prefetch: int = Field(default=4, ge=1)  # micro-batches ahead

    @model_validator(mode="after")
    def _ends(self) -> "FitConfig":
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError("max_steps and max_epochs are both null: give at least one of them")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}; the schedule goes down to it")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return after how many steps the run ends."""
        limits = [self.max_steps, None if self.max_epochs is None else self.max_epochs * steps_per_epoch]
        return min(limit for limit in limits if limit is not None)

    def last_steps(self, total: int) -> int:
        """Return how many steps at the end of a run of so many stay at `min_lr`."""
        return min(1000, total // 10) if self.constant_steps is None else self.constant_steps

    def validation_interval(self, steps_per_epoch: int) -> int | None:
        """Return every how many steps the model is validated; None for at the end only."""
        if isinstance(self.validate_every, float):
            return max(1, round(self.validate_every * steps_per_epoch))
        return self.validate_every


class ImageTextFitConfig(FitConfig):
    """The settings with which PickScore was trained, on eight processes of 16 pairs."""

    max_steps: int | None = Field(default=4000, ge=1)
    max_epochs: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=3e-6, gt=0)
    warmup_steps: int = Field(default=500, ge=0)
    validate_every: Steps | Fraction | None = 200
    save_every: int | None = Field(default=200, ge=1)


class LanguageFitConfig(FitConfig):
    """The usual settings for reward models of language with some billion weights."""

    max_tokens: int | None = Field(default=16384, ge=1)
    lr: float = Field(default=9e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    weight_decay: float = Field(default=0.1, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    constant_steps: int | None = Field(default=None, ge=0)
    min_lr: float = Field(default=9e-7, ge=0)
    validate_every: Steps | Fraction | None = 100
    save_every: int | None = Field(default=100, ge=1)


def learning_rate(config: FitConfig, step: int, total: int) -> float:
    """Return the learning rate of a step: up in a line, down along the schedule, then `min_lr`.

    With w warm-up steps, c constant ones and d = total - w - c: lr (s + 1) / (w + 1) up to step w, then
    min_lr + (lr - min_lr) f((s - w) / d), where f(x) is 1 - x (linear) or (1 + cos(pi x)) / 2 (cosine), and min_lr in
    the last c steps. The constant schedule stays at lr after the warm-up.

    Args:
        config: The schedule.
        step: Counted from 0.
        total: Steps of the whole run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    constant = config.last_steps(total)
    if step >= total - constant:
        return config.min_lr
    done = (step - config.warmup_steps) / (total - config.warmup_steps - constant)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def check_schedule(config: FitConfig, total: int) -> None:
    """Check that a schedule has steps in which to go down.

    Raises:
        ConfigError: Warm-up and constant steps leave none.
    """
    constant = config.last_steps(total)
    if config.schedule != "constant" and config.warmup_steps + constant >= total:
        raise ConfigError(
            f"train.warmup_steps={config.warmup_steps} and train.constant_steps={constant} leave none of {total} "
            f"steps for train.schedule={config.schedule}; lower them, train longer, or choose schedule constant"
        )


def validation_prefixes(sets: Iterable[str]) -> dict[str, str]:
    """Return what the metrics of each validation set begin with: `validation`, or of several `validation_<name>`."""
    names = list(sets)
    return {name: "validation" if len(names) == 1 else f"validation_{name}" for name in names}


class RewardModelConfig(Config):
    """Which reward model is trained; each kind adds its own keys."""

    reward_model_type: str


class FitRunConfig(Config):
    """Everything that decides the training of a reward model; each kind has its own `model`, `data` and defaults."""

    seed: int = 0
    output_dir: Annotated[str | None, Field(min_length=1), AfterValidator(in_home)] = None
    model: RewardModelConfig
    data: Config
    train: FitConfig = FitConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class RewardModelKind:
    """What `model.reward_model_type` chooses: the schema of the config, and what makes a run's parts from it.

    Example: `RewardModelKind(LinearRunConfig, build_linear)`; the path of such an object, `my_module.LINEAR`, is a
    `reward_model_type` too.
    """

    config: type[FitRunConfig]
    build: Callable[[Any], Fitting]  # called on every process with an instance of `config`; the model is on the CPU
    # A run in which one of these keys changes is another run: they decide on its start and on what it sees when.
    identity: tuple[str, ...] = ("model", "data")
    free: tuple[str, ...] = ()  # keys among these which decide neither, such as data.validation
