"""Runs every configured reward over a batch of samples: batching, shared instances, and failures as values."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.rewards.base import GroupwiseRewardModel, RewardArguments, RewardModel, RewardModelOutput
from tiltflow.rewards.registry import build_reward_model, identity
from tiltflow.types import RewardFailure, RewardTable, SampleBatch

Factory = Callable[[RewardArguments], RewardModel]


class RewardEngine:
    """Scores samples with several rewards; equal configurations share one model and one pass over the samples."""

    def __init__(self, rewards: Sequence[RewardArguments], *, factory: Factory = build_reward_model):
        """Build every distinct reward once.

        Args:
            rewards: One entry per column of the table.
            factory: Makes a reward from its entry; tests pass their own.

        Raises:
            RewardError: Two entries have one name, or a reward cannot be built.
        """
        names = [reward.name for reward in rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RewardError(f"rewards: name {twice[0]!r} is used twice; every entry needs its own name")
        self.rewards = tuple(rewards)
        self.names = tuple(names)
        self.weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
        self._models: dict[str, RewardModel] = {}
        for reward in rewards:
            if identity(reward) not in self._models:
                self._models[identity(reward)] = factory(reward)

    def score(self, samples: SampleBatch) -> RewardTable:
        """Score samples with every reward.

        Args:
            samples: B samples of whole groups.

        Returns:
            Scores `[B, R]`; NaN with a recorded failure where a reward with `on_error: mask` failed.

        Raises:
            RewardError: A reward with `on_error: raise` failed; names the reward, the samples and the cause.
        """
        media = _Media(samples)
        outcomes = {key: _run(model, media, samples) for key, model in self._models.items()}
        columns, failures, extra = [], [], {}
        for reward in self.rewards:
            scores, problems, info = outcomes[identity(reward)]
            named = [RewardFailure(reward.name, p.samples, p.kind, p.message) for p in problems]
            if named and reward.on_error == "raise":
                raise RewardError(_explain(named[0], samples, total=len(named)))
            columns.append(scores)
            failures += named
            if info:
                extra[reward.name] = info
        return RewardTable(self.names, torch.stack(columns, dim=1), tuple(failures), extra)


class _Media:
    """The samples in the forms that rewards ask for, each converted once."""

    def __init__(self, samples: SampleBatch):
        self._samples = samples
        self._pil: list[Image.Image] | None = None

    def fields(self, model: RewardModel, rows: Sequence[int]) -> dict[str, Any]:
        """Return the required fields of some samples as keyword arguments."""
        available: dict[str, Callable[[], list[Any]]] = {
            "prompt": lambda: [self._samples.prompts[row].text for row in rows],
            "image": lambda: self._images(rows, tensors=model.use_tensor_inputs),
            "metadata": lambda: [dict(self._samples.prompts[row].metadata) for row in rows],
        }
        return {name: available[name]() for name in model.required_fields}

    def _images(self, rows: Sequence[int], *, tensors: bool) -> list[Any]:
        if tensors:
            return [self._samples.images[row] for row in rows]
        if self._pil is None:
            pixels = (self._samples.images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            self._pil = [Image.fromarray(image.numpy()) for image in pixels]
        return [self._pil[row] for row in rows]


Outcome = tuple[Tensor, list[RewardFailure], Mapping[str, Sequence[Any]]]


class _WrongLength(RewardError):
    """A reward returned too few or too many values."""


def _run(model: RewardModel, media: _Media, samples: SampleBatch) -> Outcome:
    """Call one reward batch by batch (or group by group); what fails becomes NaN and a record."""
    scores = torch.full((len(samples),), float("nan"))
    failures: list[RewardFailure] = []
    extra: dict[str, list[Any]] = {}
    for rows in _batches(model, samples):
        try:
            with torch.no_grad():
                values, info = _read(model(**media.fields(model, rows)), len(rows))
        except Exception as error:  # any user code may fail in any way: the failure is recorded with its samples
            kind = "length" if isinstance(error, _WrongLength) else type(error).__name__
            failures.append(RewardFailure(model.config.name, tuple(rows), kind, str(error)))
            continue
        finite = values.isfinite()
        bad = [row for row, good in zip(rows, finite.tolist(), strict=True) if not good]
        if bad:
            failures.append(RewardFailure(model.config.name, tuple(bad), "not finite", "the reward is NaN or infinite"))
        scores[rows] = values.masked_fill(~finite, math.nan)
        for key, column in info.items():
            cells = extra.setdefault(key, [None] * len(samples))
            for row, cell in zip(rows, column, strict=True):
                cells[row] = cell
    return scores, failures, extra


def _batches(model: RewardModel, samples: SampleBatch) -> list[list[int]]:
    """Split rows into whole groups for groupwise rewards, into batches for the others."""
    if isinstance(model, GroupwiseRewardModel):
        return [(samples.groups == group).nonzero().flatten().tolist() for group in samples.groups.unique()]
    size = model.config.batch_size
    rows = list(range(len(samples)))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _read(output: RewardModelOutput, expected: int) -> tuple[Tensor, Mapping[str, Sequence[Any]]]:
    """Return rewards, float32 `[expected]`, and extra info after checking their form."""
    if not isinstance(output, RewardModelOutput):
        raise TypeError(f"returned {type(output).__name__}; return RewardModelOutput(rewards=...)")
    rewards = output.rewards
    if not isinstance(rewards, Tensor):
        rewards = torch.tensor([float(reward) for reward in rewards], dtype=torch.float64)
    values = rewards.detach().to("cpu", torch.float32).flatten()
    if len(values) != expected:
        raise _WrongLength(f"returned {len(values)} rewards for {expected} samples")
    info = output.extra_info or {}  # None, as some reward code has it, means nothing
    for key, column in info.items():
        if len(column) != expected:
            raise _WrongLength(f"extra_info[{key!r}] has {len(column)} values for {expected} samples")
    return values, info


def _explain(failure: RewardFailure, samples: SampleBatch, *, total: int) -> str:
    first = failure.samples[0]
    more = f" ({total - 1} more failures)" if total > 1 else ""
    return (
        f"reward {failure.reward!r} failed on {len(failure.samples)} samples, the first of prompt "
        f"{samples.prompts[first].text!r}: {failure.kind}: {failure.message}{more}; "
        "set on_error: mask for this reward to leave such samples out instead"
    )
