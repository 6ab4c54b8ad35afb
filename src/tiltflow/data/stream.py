"""Which prompts an epoch trains on: a shuffled stream that depends only on the seed and the epoch."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiltflow.errors import ConfigError
from tiltflow.types import Prompt


@dataclass(frozen=True)
class PromptGroup:
    """One prompt of one epoch and the integer id that its samples carry.

    Example: `PromptGroup(97, Prompt("a photo of a dog"))`.
    """

    id: int  # unique over epochs and ranks
    prompt: Prompt


class PromptStream:
    """Endless shuffled prompts; without tag shares, every prompt comes once before any comes twice."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, tag_shares: Mapping[str, float] | None = None):
        """Take the prompts.

        Args:
            prompts: All of them.
            seed: Seeds the shuffling.
            tag_shares: Relative frequency of each `metadata["tag"]`; None draws all prompts alike.

        Raises:
            ConfigError: A share names a tag that no prompt has, or all shares are zero.
        """
        self.prompts = list(prompts)
        self._seed = seed
        self._shares = dict(tag_shares or {})
        self._by_tag: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self._by_tag.setdefault(str(prompt.metadata.get("tag")), []).append(prompt)
        unknown = sorted(set(self._shares) - set(self._by_tag))
        if unknown:
            known = ", ".join(sorted(self._by_tag))
            raise ConfigError(f"data.tag_shares: no prompt has the tag {unknown[0]!r}; tags of this set: {known}")
        if tag_shares is not None and sum(self._shares.values()) <= 0:
            raise ConfigError("data.tag_shares: all shares are zero; give at least one tag a positive share")

    def epoch(self, epoch: int, count: int) -> list[PromptGroup]:
        """Return the `count` groups of `epoch` (counted from 1), over all ranks."""
        first = (epoch - 1) * count
        prompts = self._by_share(epoch, count) if self._shares else self._in_turn(first, count)
        return [PromptGroup(first + index, prompt) for index, prompt in enumerate(prompts)]

    def _in_turn(self, first: int, count: int) -> list[Prompt]:
        """Return the prompts at `count` positions of an endless row of shuffled rounds over the whole set."""
        size = len(self.prompts)
        rounds = range(first // size, (first + count - 1) // size + 1)
        orders = [random.Random(f"{self._seed}/{number}").sample(range(size), size) for number in rounds]
        row = [index for order in orders for index in order]
        start = first % size
        return [self.prompts[index] for index in row[start : start + count]]

    def _by_share(self, epoch: int, count: int) -> list[Prompt]:
        rng = random.Random(f"{self._seed}/{epoch}")
        tags = rng.choices(list(self._shares), list(self._shares.values()), k=count)
        return [rng.choice(self._by_tag[tag]) for tag in tags]
