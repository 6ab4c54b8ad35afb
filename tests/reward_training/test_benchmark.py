"""The benchmark beside TRL: its sides group lengths alike and take the same steps, or there is no result."""

import math

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.reward_training import BATCH, SIDES, check_same_steps, compare, window


@pytest.mark.parametrize("pairs", [64, 1600, 8000])
def test_the_window_is_that_of_transformers(pairs):
    lengths = np.random.default_rng(0).permutation(pairs)  # all different
    order = get_length_grouped_indices(lengths.tolist(), BATCH, generator=torch.Generator().manual_seed(0))
    size = BATCH * window(pairs)
    for start in range(0, pairs, size):
        found = lengths[order[start : start + size]][1:]  # the longest of all changes places with a first one
        assert (np.diff(found) < 0).all()
        if start:
            assert lengths[order[start + 1]] > lengths[order[start - 1]]  # a new window begins


def test_sides_that_take_other_steps_are_no_result():
    same = {side: {"warm": [0.69, 0.5]} for side in SIDES}
    assert check_same_steps(same) == 0
    for other in ([0.69, 0.502], [0.69, math.nan]):
        with pytest.raises(SystemExit, match="the sides do not take the same steps"):
            check_same_steps({**same, "trl": {"warm": other}})


@pytest.mark.slow
def test_the_sides_take_the_same_steps(tmp_path):
    pytest.importorskip("trl", reason="trl, of the extra 'dev', is not installed")
    found = compare(tmp_path, pairs=BATCH, rounds=1)
    assert found["first_steps_differ_by"] < 1e-4
    assert all(found[side]["pairs_per_second"] > 0 and found[side]["memory_mib"] > 0 for side in SIDES)
    assert found["speedup_over_trl"] == pytest.approx(
        found["tiltflow"]["pairs_per_second"] / found["trl"]["pairs_per_second"], rel=1e-2
    )
