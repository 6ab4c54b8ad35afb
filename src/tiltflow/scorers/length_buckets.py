"""Rows of different lengths in batches of similar length, so that little is computed on padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def length_buckets(lengths: Sequence[int], *, most: int, overhead: int) -> list[list[int]]:
    """Cut rows into buckets so that rows x longest, summed over buckets, with `overhead` for each, is least.

    The rows are sorted; the best cuts are found by dynamic programming over them:
    cost_k(j) = min_i cost_(k-1)(i) + (j - i) length_j + overhead.

    Example: `length_buckets([5, 100, 6], most=2, overhead=1)` is `[[0, 2], [1]]`.

    Args:
        lengths: Tokens of each of N rows.
        most: Buckets at most.
        overhead: What another bucket costs, in tokens.

    Returns:
        The places of each bucket's rows; the shortest first. Together all N, each once.
    """
    count = len(lengths)
    if count == 0:
        return []
    order = sorted(range(count), key=lambda place: lengths[place])
    longest = np.array([lengths[place] for place in order], dtype=np.float64)
    best = np.full(count + 1, np.inf)  # best[j]: the first j rows in the buckets so far
    best[0] = 0.0
    cuts: list[np.ndarray] = []
    totals: list[float] = []
    for _ in range(min(most, count)):
        step = np.full(count + 1, np.inf)
        cut = np.zeros(count + 1, dtype=np.int64)
        for end in range(1, count + 1):
            starts = np.arange(end)
            costs = best[:end] + (end - starts) * longest[end - 1] + overhead
            cut[end] = int(costs.argmin())
            step[end] = costs[cut[end]]
        best = step
        cuts.append(cut)
        totals.append(float(best[count]))
    buckets: list[list[int]] = []
    end = count
    for cut in reversed(cuts[: int(np.argmin(totals)) + 1]):
        start = int(cut[end])
        buckets.append(order[start:end])
        end = start
    return buckets[::-1]


def token_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Cut rows, sorted by length, into batches of at most `max_tokens` tokens with padding, and of one row at least."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batches and (len(batches[-1]) + 1) * lengths[place] <= max_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def pad_rows(rows: Sequence[Any], pad: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens padded on the right, int64 `[B, S]`, and their lengths, int64 `[B]`."""
    padded = np.full((len(rows), max(len(row) for row in rows)), pad, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded), torch.tensor([len(row) for row in rows])
