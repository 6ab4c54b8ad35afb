"""The prompt stream: what an epoch trains on depends on the seed and the epoch, and on nothing else."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from tiltflow.data import PromptStream
from tiltflow.errors import ConfigError
from tiltflow.runtime.distributed import Distributed
from tiltflow.types import Prompt

TAGGED = [Prompt(f"{tag} {number}", {"tag": tag}) for tag in ("colors", "counting", "position") for number in range(4)]


def numbered(count: int) -> list[Prompt]:
    return [Prompt(str(number)) for number in range(count)]


def texts(stream: PromptStream, epoch: int, count: int) -> list[str]:
    return [group.prompt.text for group in stream.epoch(epoch, count)]


def test_ids_are_unique_over_epochs_and_in_order() -> None:
    stream = PromptStream(numbered(5), seed=0)
    ids = [group.id for epoch in (1, 2, 3) for group in stream.epoch(epoch, 4)]
    assert ids == list(range(12))


@pytest.mark.parametrize("count", [1, 3, 7, 10, 16])
def test_every_prompt_comes_once_before_any_comes_twice(count: int) -> None:
    stream = PromptStream(numbered(7), seed=3)
    row = [text for epoch in range(1, 15) for text in texts(stream, epoch, count)]
    for start in range(0, len(row) - 6, 7):
        assert sorted(row[start : start + 7]) == ["0", "1", "2", "3", "4", "5", "6"]


def test_the_row_of_prompts_does_not_depend_on_where_epochs_are_cut() -> None:
    stream = PromptStream(numbered(7), seed=3)
    assert [text for epoch in range(1, 7) for text in texts(stream, epoch, 4)] == texts(stream, 1, 24)


def test_rounds_are_shuffled_differently() -> None:
    stream = PromptStream(numbered(20), seed=0)
    first, second = texts(stream, 1, 20), texts(stream, 2, 20)
    assert first != second
    assert first != [str(number) for number in range(20)]


@pytest.mark.parametrize("shares", [None, {"colors": 1.0, "position": 3.0}])
def test_the_same_seed_and_epoch_give_the_same_groups_whatever_was_asked_before(
    shares: dict[str, float] | None,
) -> None:
    fresh, used = (PromptStream(TAGGED, seed=5, tag_shares=shares) for _ in range(2))
    for epoch in (1, 2, 3, 9):
        used.epoch(epoch, 6)
    assert fresh.epoch(4, 6) == used.epoch(4, 6)
    assert texts(fresh, 4, 6) != texts(PromptStream(TAGGED, seed=6, tag_shares=shares), 4, 6)


@pytest.mark.parametrize("shares", [None, {"colors": 1.0, "position": 3.0}])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_share_the_groups_of_one_process(ranks: int, shares: dict[str, float] | None) -> None:
    whole = PromptStream(TAGGED, seed=1, tag_shares=shares).epoch(2, 12)
    parts = []
    for rank in range(ranks):
        place: Any = SimpleNamespace(rank=rank, world_size=ranks)
        parts += Distributed.share(place, PromptStream(TAGGED, seed=1, tag_shares=shares).epoch(2, 12))
    assert parts == whole


def test_tag_shares_decide_how_often_a_tag_comes() -> None:
    stream = PromptStream(TAGGED, seed=0, tag_shares={"colors": 1, "position": 3, "counting": 0})
    tags = Counter(group.prompt.metadata["tag"] for epoch in range(1, 11) for group in stream.epoch(epoch, 400))
    assert tags["counting"] == 0
    # 4,000 draws with p = 1/4: three standard deviations are 82.
    assert abs(tags["colors"] - 1000) < 82
    assert len({group.prompt.text for group in stream.epoch(1, 400)}) == 8


def test_more_prompts_than_an_epoch_needs_is_no_work() -> None:
    stream = PromptStream(numbered(50_000), seed=0)
    row = [text for epoch in (1, 2) for text in texts(stream, epoch, 48)]
    assert len(set(row)) == 96


def test_an_unknown_tag_names_the_tags_of_the_set() -> None:
    with pytest.raises(ConfigError, match="no prompt has the tag 'colours'; tags of this set: colors, counting, posit"):
        PromptStream(TAGGED, seed=0, tag_shares={"colours": 1.0})


def test_tag_shares_on_prompts_without_tags() -> None:
    with pytest.raises(ConfigError, match="no prompt has the tag 'colors'"):
        PromptStream(numbered(3), seed=0, tag_shares={"colors": 1.0})


@pytest.mark.parametrize("shares", [{}, {"colors": 0.0, "counting": 0.0}])
def test_all_shares_zero(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="all shares are zero"):
        PromptStream(TAGGED, seed=0, tag_shares=shares)
