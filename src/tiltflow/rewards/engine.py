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
from tiltflow.rewards.registry import build_reward_model, identity
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
        self.models: dict[str, RewardModel] = {}
        for key, entries in self.shared().items():
            self.models[key] = factory(entries[0])

    def shared(self) -> dict[str, list[RewardArguments]]:
        """Return the entries of each distinct reward."""
        groups: dict[str, list[RewardArguments]] = {}
        for reward in self.rewards:
            groups.setdefault(identity(reward), []).append(reward)
        return groups

    def begin(self, *, group_size: int | None = None) -> "Scoring":
        """Start scoring samples that come in little by little.

        Args:
            group_size: Samples per group, so that an async groupwise reward knows when one is complete; None waits
                for the end.
        """
        return Scoring(self, group_size=group_size)

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

    def __init__(self, engine: RewardEngine, *, group_size: int | None):
        """Start the lanes of the asynchronous rewards."""
        self._engine = engine
        self._media = Media()
        self._passes = {
            key: Pass(engine.models[key], entries, self._media, group_size=group_size)
            for key, entries in engine.shared().items()
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

        Args:
            prompts: B prompts with their metadata.
            groups: B ids; samples of one id are compared with each other.
            images: B tensors `[3, H, W]` in [0, 1].
            videos: B tensors `[T, 3, H, W]` in [0, 1].
            condition_images: B lists of `[3, H, W]`.
            condition_videos: B lists of `[T, 3, H, W]`.

        Raises:
            RewardError: A reward requires a field that is not given.
            ValueError: A field has not B entries.
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
            self._media.check(each.names[0], each.model)
        for each in self._passes.values():
            each.feed(rows)

    def finish(self) -> RewardTable:
        """Run the synchronous rewards, collect the asynchronous answers and merge them by sample.

        Returns:
            Scores `[B, R]`, rows in the order of submission.

        Raises:
            RewardError: A reward whose `on_error` is `raise` failed; names the reward, the samples and the cause.
        """
        passes = list(self._passes.values())
        for each in passes:
            each.flush()
        for each in passes:
            each.run_here()
        outcomes = {key: each.collect() for key, each in self._passes.items()}
        return self._merge(outcomes)

    def _merge(self, outcomes: dict[str, Outcome]) -> RewardTable:
        columns, failures, extra = [], [], {}
        for reward in self._engine.rewards:
            outcome = outcomes[identity(reward)]
            remote = self._engine.models[identity(reward)].remote
            named = [RewardFailure(reward.name, p.samples, p.kind, p.message) for p in outcome.failures]
            if named and (reward.on_error or ("mask" if remote else "raise")) == "raise":
                raise RewardError(self._explain(named))
            columns.append(outcome.scores)
            failures += named
            if outcome.extra_info:
                extra[reward.name] = outcome.extra_info
        return RewardTable(self._engine.names, torch.stack(columns, dim=1), tuple(failures), extra)

    def _explain(self, failures: Sequence[RewardFailure]) -> str:
        first = failures[0]
        more = f" ({len(failures) - 1} more failures)" if len(failures) > 1 else ""
        return (
            f"reward {first.reward!r} failed on {len(first.samples)} samples, the first of prompt "
            f"{self._media.prompts[first.samples[0]].text!r}: {first.kind}: {first.message}{more}; "
            "set on_error: mask for this reward to leave such samples out instead"
        )

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each in self._passes.values():
            each.close()
