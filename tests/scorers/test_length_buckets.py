"""Buckets of similar length: every row once, and no better way to cut them."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from tiltflow.scorers.length_buckets import length_buckets, token_batches


def cost(lengths, buckets, overhead):
    return sum(len(part) * max(lengths[place] for place in part) + overhead for part in buckets)


def least_cost(lengths, most, overhead):
    """Try every way to cut the sorted rows."""
    rows, count = sorted(lengths), len(lengths)
    ways = [cuts for k in range(most) for cuts in combinations(range(1, count), k)]
    ends = [[0, *cuts, count] for cuts in ways]
    return min(sum((b - a) * rows[b - 1] + overhead for a, b in pairwise(e)) for e in ends)


@pytest.mark.parametrize("most", [1, 2, 3, 9])
@pytest.mark.parametrize("overhead", [0, 3, 40])
def test_no_cut_is_cheaper(most, overhead):
    generator = np.random.default_rng(most)
    for _ in range(20):
        lengths = generator.integers(1, 60, size=7).tolist()
        buckets = length_buckets(lengths, most=most, overhead=overhead)
        assert sorted(place for part in buckets for place in part) == list(range(7))
        assert len(buckets) <= most
        assert cost(lengths, buckets, overhead) == least_cost(lengths, most, overhead)


def test_equal_lengths_are_one_bucket_and_nothing_is_none():
    assert length_buckets([4, 4, 4], most=3, overhead=1) == [[0, 1, 2]]
    assert length_buckets([], most=3, overhead=1) == []


def test_token_batches_hold_every_row_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 90, size=50).tolist()
    batches = token_batches(lengths, max_tokens=200)
    assert sorted(place for part in batches for place in part) == list(range(50))
    assert all(len(part) * max(lengths[place] for place in part) <= 200 for part in batches)
    assert token_batches([500, 1], max_tokens=100) == [[1], [0]]
