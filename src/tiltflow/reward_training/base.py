"""What the trainer of reward models and the models that it trains agree on.

A loss is told as a sum over samples together with the weight of these samples, never as a mean: sums add up over
micro-batches, processes and a last batch that is not full; means do not.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiltflow.errors import ConfigError

# Tensors and lists of one length B, as `Examples.batch` made them.
Batch: TypeAlias = Mapping[str, Any]

# Sums over samples, under names of the model's own; they add up key by key. Always the same keys for one model.
Totals: TypeAlias = Mapping[str, float]


class TrainableRewardModel(nn.Module, ABC):
    """A reward model while it is trained.

    Where several processes share the work, every parameter that is trained must take part in every `forward`, also in
    one whose rows all have weight 0.
    """

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the classes of modules that FSDP2 gathers one at a time: the layers of a transformer, if it has any.

        All processes must call each of them equally often in a `forward`.
        """
        return ()

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """Return how much a batch counts in the mean loss of its step: its pairs, labels or weights; maybe 0."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, Totals]:
        """Return the loss of a batch as a sum, and what the metrics are made of.

        Rows of weight 0, with which the trainer fills up a last batch, count nowhere.

        Returns:
            A differentiable float32 scalar, which divided by the `weight` of all batches of a step is the step's loss;
            and sums of which `metrics` makes the metrics.
        """

    @abstractmethod
    def metrics(self, totals: Totals) -> dict[str, float]:
        """Return metrics from sums over any number of batches: always `loss`; NaN where nothing was counted."""

    @property
    def metric_names(self) -> Sequence[str]:
        """What `metrics` returns, so that a wrong `keep_best.metric` is found before the first step; () is unknown."""
        return ()

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the trained model where the reward of this kind, and the library it came from, can load it."""

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass rather than keep them; called once, before training.

        Raises:
            ConfigError: The model has nothing to do so with.
        """
        raise ConfigError(
            f"train.gradient_checkpointing=true: {type(self).__name__} cannot compute its activations again; set it to "
            "false, and train.micro_batch_size lower where memory is short"
        )

    def get_loss_and_metrics(self, batch: Batch, forward_only: bool = True) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of a batch and its metrics, exact over all processes of the group, if there is one.

        Every process calls it, each with its own rows; sums and weights are added up before anything is divided.
        Call `prepare_for_validation_step` or `prepare_for_training_step` first: this changes no mode.

        Args:
            batch: This process's rows, on the model's device.
            forward_only: False also runs the backward pass. Each process then holds the gradient of its own rows'
                part of the mean loss, added to what was there: the sum over processes is the gradient of the mean.

        Returns:
            A detached float32 scalar, the same on every process, and the metrics. Both are NaN where nothing counts,
            and nothing then runs backward.
        """
        with torch.set_grad_enabled(not forward_only):
            loss, totals = self(batch)
        parts = [self.weight(batch), float(loss.detach()), *totals.values()]
        weight, loss_sum, *sums = _over_processes(parts, device=loss.device)
        mean = loss_sum / weight if weight > 0 else float("nan")
        if not forward_only and weight > 0:
            (loss / weight).backward()
        return torch.tensor(mean, device=loss.device), self.metrics(dict(zip(totals, sums, strict=True)))

    def prepare_for_training_step(self) -> None:
        """Enter training mode."""
        self.train()

    def finish_training_step(self) -> None:
        """Do nothing more; a model may."""

    def prepare_for_validation_step(self) -> None:
        """Enter eval mode."""
        self.eval()

    def finish_validation_step(self) -> None:
        """Return to training mode."""
        self.train()


class Examples(Protocol):
    """A data set of which batches are made."""

    @property
    def lengths(self) -> Sequence[int]:
        """How much each example costs: tokens of its texts, padded to one length, or 1 where all cost the same."""
        ...

    def __len__(self) -> int: ...

    def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
        """Read, decode and collate examples.

        Args:
            places: B indices, each from 0 to `len - 1`.
            weights: B: 1, or 0 for a row that only fills up a batch.
        """
        ...


@dataclass(frozen=True)
class Shown:
    """One example as people look at it.

    Example: `Shown("a red cube", (first, second), ("label 1, reward 3.20", "label 0, reward 1.10"))`.
    """

    caption: str
    images: Sequence[Tensor]  # each uint8 [H, W, 3], of any size
    notes: Sequence[str]  # one of each image


# Shows a batch: with the whole model in eval mode, on one process alone and without gradient.
Shows: TypeAlias = Callable[[Any, Batch], Sequence[Shown]]


@dataclass(frozen=True)
class Fitting:
    """What a training run is made of, once its config has been read and its data looked through."""

    model: TrainableRewardModel
    train: Examples
    validation: Mapping[str, Examples] = field(default_factory=dict[str, Examples])  # by name; may be empty
    notes: Mapping[str, int] = field(default_factory=dict[str, int])  # what was left out of the data, and how often
    remarks: Sequence[str] = ()  # what the user may not have meant
    shows: Shows | None = None  # makes a few validation examples visible; None: there is nothing to look at
    # What is only found when examples are read: set (`train`, `validation NAME`) -> record -> why it is left out.
    # `batch` adds to it; the trainer brings together what several processes find, and keeps it in checkpoints.
    found: Mapping[str, dict[int, str]] = field(default_factory=dict[str, dict[int, str]])

    def left_out(self) -> dict[str, int]:
        """Return what has been left out of each set so far, and how often."""
        # Lists, for threads that read ahead go on adding.
        found = Counter(f"{name}: {why}" for name, records in self.found.items() for why in list(records.values()))
        return {**self.notes, **dict(sorted(found.items()))}


def _over_processes(values: Sequence[float], *, device: torch.device) -> list[float]:
    """Return the float64 sums over all processes; the values themselves where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()
