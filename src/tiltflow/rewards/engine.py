"""Runs every configured reward over samples: synchronous ones at the end, asynchronous ones while samples come in.

    with engine.begin(group_size=24) as scoring:
        for batch in sampling:          # async pointwise rewards start when their batch is full,
            scoring.add(...)            # async groupwise ones when their group is complete
        table = scoring.finish()        # sync rewards run now, then the async answers are collected

Equal configurations share one model and one pass over the samples; media are converted once per sample.
"""

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.rewards.base import RewardArguments, RewardModel
from tiltflow.rewards.media import Conditions, Media
from tiltflow.rewards.passes import Outcome, Pass
from tiltflow.rewards.registry import build_reward_model, identity, shared_entries
from tiltflow.types import Prompt, RewardFailure, RewardTable, SampleBatch

Factory = Callable[[RewardArguments], RewardModel]


class RewardEngine:
    """Scores samples with several rewards."""

    def __init__(self, rewards: Sequence[RewardArguments], *, factory: Factory = build_reward_model):
        """Build every distinct reward once.

        Entries that differ only in name, weight, batch size, failure policy or lanes share one model and one pass; the
        pass takes the largest batch size and number of workers, and is asynchronous if one of them is.

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
        self.keys = tuple(map(identity, rewards))
        self.shared = shared_entries(rewards)
        self.models = {key: factory(entry) for key, entry in self.shared.items()}

    def begin(self, *, group_size: int | None = None, stop_early: bool = True) -> "Scoring":
        """Start scoring samples that come in little by little.

        Args:
            group_size: Samples per group, so that an async groupwise reward knows when one is complete; None waits
                for the end.
            stop_early: Raise as soon as an asynchronous reward is known to have failed; False waits for `finish`, which
                is where processes that sample together must part.
        """
        return Scoring(self, group_size=group_size, stop_early=stop_early)

    def score(self, samples: SampleBatch) -> RewardTable:
        """Score samples that are all there.

        Args:
            samples: B samples of whole groups.

        Returns:
            Scores `[B, R]`; NaN with a recorded failure where a reward with `on_error: mask` failed.

        Raises:
            RewardError: A reward with `on_error: raise` failed; names the reward, the samples and the cause.
        """
        with self.begin() as scoring:
            scoring.add_batch(samples)
            return scoring.finish()


class Scoring:
    """One table in the making; leaving its `with` block ends its worker threads."""

    def __init__(self, engine: RewardEngine, *, group_size: int | None, stop_early: bool):
        """Start the lanes of the asynchronous rewards."""
        self._engine = engine
        self._stop_early = stop_early
        self._media = Media()
        self._passes = {
            key: Pass(engine.models[key], entry, self._media, group_size=group_size)
            for key, entry in engine.shared.items()
        }

    def add_batch(self, samples: SampleBatch) -> None:
        """Submit samples as the policies make them."""
        self.add(samples.prompts, samples.groups.tolist(), images=samples.images)

    def add(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        *,
        images: Sequence[Tensor] | Tensor | None = None,
        videos: Sequence[Tensor] | Tensor | None = None,
        condition_images: Conditions | None = None,
        condition_videos: Conditions | None = None,
    ) -> None:
        """Submit samples; asynchronous rewards begin with those that are ready.

        The tensors are not copied and must not be written to before `finish` has returned.

        Args:
            prompts: B prompts with their metadata.
            groups: B ids; samples of one id are compared with each other.
            images: B tensors `[3, H, W]` in [0, 1].
            videos: B tensors `[T, 3, H, W]` in [0, 1].
            condition_images: B lists of `[3, H, W]`, or stacked ones.
            condition_videos: B lists of `[T, 3, H, W]`, or stacked ones.

        Raises:
            RewardError: A reward requires a field that is not given, or an asynchronous one whose `on_error` is `raise`
                has failed meanwhile, or one has written to the tensors.
            ValueError: A field has not B entries, or they are no images.
        """
        rows = self._media.add(
            prompts,
            groups,
            images=images,
            videos=videos,
            condition_images=condition_images,
            condition_videos=condition_videos,
        )
        for each in self._passes.values():
            self._media.check(each.name, each.model)
        for each in self._passes.values():
            each.feed(rows)
            if self._stop_early:
                self._stop_on(each.early_failures())

    def finish(self) -> RewardTable:
        """Run the synchronous rewards, collect the asynchronous answers and merge them by sample.

        Returns:
            Scores `[B, R]`, rows in the order of submission.

        Raises:
            RewardError: A reward whose `on_error` is `raise` failed; names the reward, the samples and the cause. Or a
                reward has written to the tensors, whatever its `on_error`.
        """
        passes = list(self._passes.values())
        for each in passes:
            each.flush()
        ordered = sorted(self._passes.items(), key=lambda item: item[1].asynchronous)  # synchronous ones first
        outcomes: dict[str, Outcome] = {}
        for key, each in ordered:
            self._stop_on(each.early_failures())
            outcomes[key] = each.collect()
            self._stop_on(outcomes[key].failures if each.raises else ())
        return self._merge(outcomes)

    def _merge(self, outcomes: dict[str, Outcome]) -> RewardTable:
        columns, failures, extra = [], [], {}
        for reward, key in zip(self._engine.rewards, self._engine.keys, strict=True):
            outcome = outcomes[key]
            columns.append(outcome.scores)
            failures += [RewardFailure(reward.name, p.samples, p.kind, p.message) for p in outcome.failures]
            if outcome.extra_info:
                extra[reward.name] = outcome.extra_info
        return RewardTable(self._engine.names, torch.stack(columns, dim=1), tuple(failures), extra)

    def _stop_on(self, failures: Sequence[RewardFailure]) -> None:
        if not failures:
            return
        first = failures[0]
        more = f" ({len(failures) - 1} more failures)" if len(failures) > 1 else ""
        raise RewardError(
            f"reward {first.reward!r} failed on {len(first.samples)} samples, the first of prompt "
            f"{self._media.prompts[first.samples[0]].text!r}: {first.kind}: {first.message}{more}; "
            "set on_error: mask for this reward to leave such samples out instead"
        )

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each in self._passes.values():
            each.close()
        self._media.clear()
