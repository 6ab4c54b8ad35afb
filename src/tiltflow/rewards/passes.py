"""One pass of one reward over the samples of a table: when it is called, with what, and what becomes of its answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltflow.errors import RewardError, UnparsableError
from tiltflow.rewards.base import GroupwiseRewardModel, RewardArguments, RewardModel, RewardModelOutput
from tiltflow.rewards.lanes import Call, Inline, Lanes, Runner
from tiltflow.rewards.media import Media
from tiltflow.rewards.places import with_place
from tiltflow.types import RewardFailure


@dataclass(frozen=True)
class Answer:
    """What a reward says about the B samples of one call."""

    scores: Tensor  # [B] float32 on the CPU
    extra_info: Mapping[str, Sequence[Any]]  # key -> B plain values
    failures: Mapping[int, Exception]  # place in the call -> why


@dataclass(frozen=True)
class Outcome:
    """What one reward says about all samples of a table."""

    scores: Tensor  # [B] float32; NaN where it failed
    failures: Sequence[RewardFailure]
    extra_info: Mapping[str, Sequence[Any]]  # key -> B values


class WrongLength(RewardError):
    """A reward returned too few or too many values."""


class WrittenMedia(RewardError):
    """Somebody wrote to the tensors that a reward looked at: the scores of all others may be of something else."""


class Job:
    """One call of a reward. It lets go of the media when it begins, so that a call that hangs keeps only its own."""

    def __init__(self, model: RewardModel, media: Media, rows: Sequence[int]):
        self.model = model
        self.media: Media | None = media
        self.rows = rows

    def __call__(self) -> Answer:
        """Ask the reward about the rows.

        Raises:
            WrittenMedia: The reward wrote to its tensors, or one that scored at the same time; names all of these.
        """
        assert self.media is not None
        fields, lookers = self.media.fields(self.model, self.rows), self.media.lookers
        self.media = None
        with lookers.join(self.model.config.name) as names:
            before = Media.writes(fields)
            try:
                with torch.no_grad():
                    return read_output(self.model(**fields), len(self.rows))
            finally:
                if Media.writes(fields) != before:
                    who = f"reward{'s' * (len(names) > 1)} {', '.join(map(repr, sorted(names)))}"
                    raise WrittenMedia(
                        f"the tensors of the samples were written to while {who} scored them, and other rewards look "
                        "at them too; let it clone() a tensor before it changes it"
                    )


class Pass:
    """Feeds one reward with batches or groups, in worker threads if it is asynchronous."""

    def __init__(self, model: RewardModel, entry: RewardArguments, media: Media, *, group_size: int | None):
        """Prepare a pass, and start its lanes if it is asynchronous.

        Args:
            model: The reward.
            entry: What the entries that share it come to.
            media: The samples, shared by all passes.
            group_size: Samples per group, if that is known before the end.
        """
        self.model = model
        self.name = entry.name
        self.asynchronous = entry.async_reward
        self.raises = (entry.on_error or ("mask" if model.remote else "raise")) == "raise"
        self._media = media
        self._batch_size = entry.batch_size
        self._group_size = group_size
        self._waiting: list[int] = []
        self._jobs: list[tuple[list[int], Call[Answer]]] = []
        self._unseen = 0  # the first job that `early_failures` has not looked at
        self._runner: Runner[Answer] = Inline()
        if self.asynchronous:
            timeout = None if model.times_itself else entry.timeout
            self._runner = Lanes(entry.num_workers, name=f"reward-{entry.name}", timeout=timeout)
        self._broken: list[RewardFailure] = []

    def feed(self, rows: Sequence[int]) -> None:
        """Take new samples; an asynchronous reward begins with the batches or groups that are now full.

        Samples with a medium that is not finite are recorded as failures and never shown to the reward: it would spoil
        the answers about others, or make a number of what is none.
        """
        self._waiting += self._sound(rows)
        if not self.asynchronous:
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

    def early_failures(self) -> list[RewardFailure]:
        """Return the failures that are known already, if any of them ends the scoring; never waits."""
        if not self.raises:
            return []
        failures = list(self._broken)
        while self.asynchronous and self._unseen < len(self._jobs) and self._jobs[self._unseen][1].done.is_set():
            rows, call = self._jobs[self._unseen]
            failures += self._failures(rows, self._answer(call))
            self._unseen += 1
        return failures

    def collect(self) -> Outcome:
        """Make the calls of a synchronous reward, or wait for those of an asynchronous one, and sort the answers.

        Where a failure ends the scoring, the calls after it are not made or waited for.
        """
        total = len(self._media)
        scores = torch.full((total,), math.nan)
        failures = list(self._broken)
        extra: dict[str, list[Any]] = {}
        for rows, call in self._jobs:
            if failures and self.raises:
                break
            answer = self._answer(call)
            failures += self._failures(rows, answer)
            if isinstance(answer, Exception):
                continue
            scores[rows] = answer.scores.masked_fill(~_valid(answer), math.nan)
            for key, column in answer.extra_info.items():
                cells = extra.setdefault(key, [None] * total)
                for row, cell in zip(rows, column, strict=True):
                    cells[row] = cell
        return Outcome(scores, failures, extra)

    def close(self) -> None:
        """End the worker threads; calls that have not begun are dropped."""
        self._runner.close()

    def _sound(self, rows: Sequence[int]) -> list[int]:
        """Return the rows whose media are finite, and keep a record of the others."""
        broken = {row: field for row in rows if (field := self._media.broken_field(self.model, row)) is not None}
        for field in dict.fromkeys(broken.values()):
            samples = tuple(row for row in broken if broken[row] == field)
            self._broken.append(RewardFailure(self.name, samples, "not finite", f"NaN or infinite values in {field}"))
        return [row for row in rows if row not in broken]

    def _submit(self, rows: list[int]) -> None:
        self._jobs.append((rows, self._runner.submit(Job(self.model, self._media, rows))))

    def _answer(self, call: Call[Answer]) -> Answer | Exception:
        try:
            return self._runner.wait(call)
        except WrittenMedia:
            raise  # whatever `on_error` says: the other rewards' scores cannot be trusted either
        except Exception as error:  # any user code may fail in any way: it is recorded with its samples
            return error

    def _failures(self, rows: Sequence[int], answer: Answer | Exception) -> list[RewardFailure]:
        """Return the failures of one call, one for each distinct reason."""
        if isinstance(answer, Exception):
            return [RewardFailure(self.name, tuple(rows), _kind(answer), with_place(answer))]
        reasons: dict[tuple[str, str], list[int]] = {}
        for place, error in sorted(answer.failures.items()):
            reasons.setdefault((_kind(error), with_place(error)), []).append(rows[place])
        for place in (~answer.scores.isfinite()).nonzero().flatten().tolist():
            if place not in answer.failures:
                reasons.setdefault(("not finite", "the reward is NaN or infinite"), []).append(rows[place])
        return [RewardFailure(self.name, tuple(bad), *reason) for reason, bad in reasons.items()]

    def _by_group(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for row in self._waiting:
            groups.setdefault(self._media.groups[row], []).append(row)
        return list(groups.values())


def read_output(output: RewardModelOutput, expected: int) -> Answer:
    """Check the form of what a reward returned for `expected` samples, and bring it to the CPU.

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
    return Answer(values, {key: [_plain(cell) for cell in column] for key, column in info.items()}, output.failures)


def _valid(answer: Answer) -> Tensor:
    """Return which scores count, bool `[B]`."""
    valid = answer.scores.isfinite()
    valid[list(answer.failures)] = False
    return valid


def _plain(cell: Any) -> Any:
    """Return a tensor or numpy value as a number or lists of numbers, and anything else as it is."""
    if isinstance(cell, Tensor):
        return cell.detach().tolist()
    return cell.tolist() if isinstance(cell, np.generic | np.ndarray) else cell


def _kind(error: Exception) -> str:
    """Return what a failure is called in the table."""
    if isinstance(error, WrongLength):
        return "length"
    if isinstance(error, UnparsableError):
        return "unparsable"
    return "timeout" if isinstance(error, TimeoutError) else type(error).__name__
