"""One pass of one reward over the samples of a table: when it is called, with what, and what becomes of its answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.rewards.base import GroupwiseRewardModel, RewardArguments, RewardModel, RewardModelOutput
from tiltflow.rewards.lanes import Call, Lanes
from tiltflow.rewards.media import Media
from tiltflow.types import RewardFailure

Answer = tuple[Tensor, Mapping[str, Sequence[Any]], Mapping[int, Exception]]


@dataclass(frozen=True)
class Outcome:
    """What one reward says about B samples."""

    scores: Tensor  # [B] float32; NaN where it failed
    failures: Sequence[RewardFailure]
    extra_info: Mapping[str, Sequence[Any]]  # key -> B values


class WrongLength(RewardError):
    """A reward returned too few or too many values."""


class Pass:
    """Feeds one reward with batches or groups, in worker threads if it is asynchronous."""

    def __init__(self, model: RewardModel, entries: Sequence[RewardArguments], media: Media, *, group_size: int | None):
        """Prepare a pass, and start its lanes if one of its entries is asynchronous.

        Args:
            model: The reward.
            entries: Those that it serves.
            media: The samples, shared by all passes.
            group_size: Samples per group, if that is known before the end.
        """
        self.model = model
        self.names = [entry.name for entry in entries]
        self._media = media
        self._batch_size = max(entry.batch_size for entry in entries)
        self._group_size = group_size
        self._waiting: list[int] = []
        self._jobs: list[tuple[list[int], Call[Answer] | None]] = []
        self._lanes: Lanes[Answer] | None = None
        if any(entry.async_reward for entry in entries):
            workers = max(entry.num_workers for entry in entries if entry.async_reward)
            # A remote reward keeps to the timeout in each of its requests; a call may be several, tried several times.
            timeouts = [entry.timeout for entry in entries if entry.timeout is not None and not model.remote]
            self._lanes = Lanes(workers, name=f"reward-{self.names[0]}", timeout=max(timeouts, default=None))
        self._answers: dict[int, Answer | Exception] = {}
        self._broken: list[RewardFailure] = []

    def feed(self, rows: Sequence[int]) -> None:
        """Take new samples; an asynchronous reward begins with the batches or groups that are now full.

        Samples with a medium that is not finite are recorded as failures and never shown to the reward: it would spoil
        the answers about others, or make a number of what is none.
        """
        self._waiting += self._sound(rows)
        if self._lanes is None:
            return
        if not isinstance(self.model, GroupwiseRewardModel):
            while len(self._waiting) >= self._batch_size:
                self._submit(self._waiting[: self._batch_size])
                del self._waiting[: self._batch_size]
        elif self._group_size is not None:
            for group in self._by_group():
                if len(group) >= self._group_size:
                    self._submit(group)
                    taken = set(group)
                    self._waiting = [row for row in self._waiting if row not in taken]

    def flush(self) -> None:
        """Begin with what is left: partial batches, and groups as they are."""
        if isinstance(self.model, GroupwiseRewardModel):
            parts = self._by_group()
        else:
            size = self._batch_size
            parts = [self._waiting[start : start + size] for start in range(0, len(self._waiting), size)]
        self._waiting = []
        for rows in parts:
            self._submit(rows)

    def run_here(self) -> None:
        """Do the calls of a synchronous reward."""
        if self._lanes is not None:
            return
        for index, (rows, _) in enumerate(self._jobs):
            try:
                self._answers[index] = self._ask(rows)
            except Exception as error:  # any user code may fail in any way: it is recorded with its samples
                self._answers[index] = error

    def collect(self) -> Outcome:
        """Wait for all calls and put their answers in the places of their samples."""
        total = len(self._media)
        scores = torch.full((total,), math.nan)
        failures = list(self._broken)
        extra: dict[str, list[Any]] = {}
        for index, (rows, _) in enumerate(self._jobs):
            answer = self._answer(index)
            if isinstance(answer, Exception):
                failures.append(RewardFailure(self.names[0], tuple(rows), _kind(answer), str(answer)))
                continue
            values, info, told = answer
            failures += self._told(rows, told)
            finite = values.isfinite()
            bad = [row for place, row in enumerate(rows) if not finite[place] and place not in told]
            if bad:
                failures.append(RewardFailure(self.names[0], tuple(bad), "not finite", "the reward is NaN or infinite"))
            finite[list(told)] = False
            scores[rows] = values.masked_fill(~finite, math.nan)
            for key, column in info.items():
                cells = extra.setdefault(key, [None] * total)
                for row, cell in zip(rows, column, strict=True):
                    cells[row] = cell
        return Outcome(scores, failures, extra)

    def close(self) -> None:
        """End the worker threads; calls that have not begun are dropped."""
        if self._lanes is not None:
            self._lanes.close()

    def _sound(self, rows: Sequence[int]) -> list[int]:
        """Return the rows whose media are finite, and keep a record of the others."""
        broken = {row: field for row in rows if (field := self._media.broken_field(self.model, row)) is not None}
        for field in dict.fromkeys(broken.values()):
            samples = tuple(row for row in broken if broken[row] == field)
            self._broken.append(
                RewardFailure(self.names[0], samples, "not finite", f"NaN or infinite values in {field}")
            )
        return [row for row in rows if row not in broken]

    def _submit(self, rows: list[int]) -> None:
        call = None if self._lanes is None else self._lanes.submit(lambda: self._ask(rows))
        self._jobs.append((rows, call))

    def _answer(self, index: int) -> Answer | Exception:
        _, call = self._jobs[index]
        if call is None or self._lanes is None:
            return self._answers[index]
        try:
            return self._lanes.wait(call)
        except Exception as error:  # as above: a failure is a value
            return error

    def _told(self, rows: Sequence[int], told: Mapping[int, Exception]) -> list[RewardFailure]:
        """Return the failures that a reward told of single samples, one for each distinct reason."""
        reasons: dict[tuple[str, str], list[int]] = {}
        for place, error in sorted(told.items()):
            reasons.setdefault((_kind(error), str(error)), []).append(rows[place])
        return [RewardFailure(self.names[0], tuple(bad), *reason) for reason, bad in reasons.items()]

    def _ask(self, rows: Sequence[int]) -> Answer:
        with torch.no_grad():
            return read_output(self.model(**self._media.fields(self.model, rows)), len(rows))

    def _by_group(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for row in self._waiting:
            groups.setdefault(self._media.groups[row], []).append(row)
        return list(groups.values())


def read_output(output: RewardModelOutput, expected: int) -> Answer:
    """Return rewards, float32 `[expected]` on the CPU, extra info and failures after checking their form.

    Raises:
        TypeError: The reward returned something else than a RewardModelOutput.
        WrongLength: It returned too few or too many values, or a failure of a sample that it was not given.
    """
    if not isinstance(output, RewardModelOutput):
        raise TypeError(f"returned {type(output).__name__}; return RewardModelOutput(rewards=...)")
    rewards = output.rewards
    if not isinstance(rewards, Tensor):
        rewards = torch.tensor([float(reward) for reward in rewards], dtype=torch.float64)
    values = rewards.detach().to("cpu", torch.float32).flatten()
    if len(values) != expected:
        raise WrongLength(f"returned {len(values)} rewards for {expected} samples")
    info = output.extra_info or {}  # None, as some reward code has it, means nothing
    for key, column in info.items():
        if len(column) != expected:
            raise WrongLength(f"extra_info[{key!r}] has {len(column)} values for {expected} samples")
    if strangers := [place for place in output.failures if not 0 <= place < expected]:
        raise WrongLength(f"failures names sample {strangers[0]} of {expected}")
    return values, info, output.failures


def _kind(error: Exception) -> str:
    """Return what a failure is called in the table."""
    if isinstance(error, WrongLength):
        return "length"
    return "timeout" if isinstance(error, TimeoutError) else type(error).__name__
