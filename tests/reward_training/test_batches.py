"""Coverage, shares and cuts of batches, counted row by row."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from tiltflow.errors import ConfigError, DataError, GeometryError
from tiltflow.reward_training.batches import Batches, MicroBatch, Step

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 200, size=53)]


def real(step: Step) -> list[int]:
    """Return the examples of a step that count."""
    return [place for micro in step.micro_batches for place, w in zip(micro.places, micro.weights, strict=True) if w]


def tokens(batches: Batches, lengths: list[int]) -> int:
    """Return rows times the longest of them, over the micro-batches of an epoch: what a padded pass costs."""
    micros = [micro for step in batches.epoch() for micro in step.micro_batches]
    return sum(len(micro.places) * max(lengths[place] for place in micro.places) for micro in micros)


OPTIONS = [
    {},
    {"micro_batch_size": 2},
    {"max_tokens": 300},
    {"micro_batch_size": 3, "max_tokens": 500, "length_window": 3},
    {"length_window": 100},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_example_counts_once_an_epoch_on_any_number_of_processes(world_size: int, options: dict) -> None:
    ranks = [
        Batches(LENGTHS, batch_size=8, seed=5, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    alone = Batches(LENGTHS, batch_size=8, seed=5, **options)
    assert alone.steps_per_epoch == 7
    for epoch in range(2):
        together = [list(batches.epoch(epoch)) for batches in ranks]
        seen = Counter(place for steps in together for step in steps for place in real(step))
        assert seen == Counter(range(53))
        for single, parts in zip(alone.epoch(epoch), zip(*together, strict=True), strict=True):
            assert sorted(real(single)) == sorted(place for part in parts for place in real(part))
            assert {part.number for part in parts} == {single.number}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_make_the_same_forward_passes_of_about_one_length(world_size: int, options: dict) -> None:
    ranks = [
        list(Batches(LENGTHS, batch_size=8, seed=5, rank=r, world_size=world_size, **options).epoch())
        for r in range(world_size)
    ]
    for parts in zip(*ranks, strict=True):
        assert len({len(part.micro_batches) for part in parts}) == 1
        for micros in zip(*(part.micro_batches for part in parts), strict=True):
            assert len({len(micro.places) for micro in micros}) == 1
        shares = [sum(LENGTHS[place] for m in part.micro_batches for place in m.places) for part in parts]
        longest = max(LENGTHS[place] for part in parts for m in part.micro_batches for place in m.places)
        assert max(shares) - min(shares) <= longest  # dealt out longest first: no share is ahead by more than a row


def test_a_last_batch_is_filled_with_its_shortest_example_of_weight_0() -> None:
    parts = [Batches([5, 9, 7], batch_size=4, rank=rank, world_size=2).step(0) for rank in range(2)]
    assert [part.micro_batches for part in parts] == [
        (MicroBatch((1, 0), (1.0, 1.0)),),
        (MicroBatch((2, 0), (1.0, 0.0)),),
    ]


def test_rows_are_cut_by_number_and_by_tokens() -> None:
    lengths = [10, 10, 4, 4, 4, 2, 2, 1]
    step = Batches(lengths, batch_size=8, max_tokens=12).step(0)
    assert [micro.places for micro in step.micro_batches] == [(0,), (1,), (2, 3, 4), (5, 6, 7)]
    step = Batches(lengths, batch_size=8, max_tokens=12, micro_batch_size=2).step(0)
    assert [micro.places for micro in step.micro_batches] == [(0,), (1,), (2, 3), (4, 5), (6, 7)]
    too_long = Batches([50, 1], batch_size=2, max_tokens=12).step(0)
    assert [micro.places for micro in too_long.micro_batches] == [(0,), (1,)]


def test_order_follows_from_seed_and_epoch_and_goes_on_from_any_step() -> None:
    def orders(seed: int | None, start: int, stop: int) -> list[list[int]]:
        return [real(step) for step in Batches([1] * 20, batch_size=4, seed=seed, length_window=2).steps(start, stop)]

    whole = orders(3, 0, 12)
    assert orders(3, 7, 12) == whole[7:]
    assert whole[:5] != whole[5:10] and orders(4, 0, 5) != whole[:5]
    assert sorted(chain(*whole[:5])) == sorted(chain(*whole[5:10])) == list(range(20))
    assert list(chain(*orders(None, 0, 10))) == [*range(20), *range(20)]


def test_batches_of_like_lengths_cost_fewer_tokens() -> None:
    lengths = [int(length) for length in np.random.default_rng(1).lognormal(5, 1, size=1000)]
    costs = [tokens(Batches(lengths, batch_size=16, seed=0, length_window=window), lengths) for window in (0, 20)]
    floor = sum(lengths)
    assert costs[0] > 4 * floor and costs[1] < 1.65 * floor
    order = [len(step.micro_batches[0].places) for step in Batches(lengths, batch_size=16, seed=0).epoch()]
    assert order == [16] * 62 + [8]  # the batch that is not full comes last


def test_windows_do_not_sort_the_epoch() -> None:
    lengths = list(range(1, 401))
    batches = Batches(lengths, batch_size=10, seed=0, length_window=10)
    means = [np.mean([lengths[place] for place in real(step)]) for step in batches.epoch()]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5
    spreads = [np.ptp([lengths[place] for place in real(step)]) for step in batches.epoch()]
    assert max(spreads) < 120  # of 400


def test_a_limit_takes_the_same_examples_each_time_and_samples_are_counted() -> None:
    batches = Batches([1] * 100, batch_size=8, seed=1, limit=20)
    chosen = [place for step in batches.epoch() for place in real(step)]
    assert len(set(chosen)) == 20 and chosen == [place for step in batches.epoch() for place in real(step)]
    assert [batches.samples(steps) for steps in (0, 1, 2, 3, 4, 6)] == [0, 8, 16, 20, 28, 40]
    assert Batches([1] * 5, batch_size=8, limit=100).samples(1) == 5


@pytest.mark.parametrize(
    ("lengths", "options", "error", "words"),
    [
        ([], {"batch_size": 1}, DataError, "no example"),
        ([1], {"batch_size": 0}, ConfigError, "batch_size=0: use at least 1"),
        ([1], {"batch_size": 2, "micro_batch_size": 0}, ConfigError, "micro_batch_size=0"),
        ([1], {"batch_size": 2, "max_tokens": -1}, ConfigError, "max_tokens=-1"),
        ([1], {"batch_size": 2, "world_size": 4}, GeometryError, "batch_size=2 .* nearest legal: 4 or 8"),
    ],
)
def test_wrong_sizes(lengths: list[int], options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Batches(lengths, **options)
