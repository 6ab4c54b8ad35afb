"""Advantages against released code, against hand-worked groups, and across ranks."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.shared import case_tensors, golden, requires_shared
from tiltflow.training.advantages import group_advantages

NAN = float("nan")
KINDS: list[dict[str, Any]] = [
    {"aggregation": "sum", "std": "global"},
    {"aggregation": "sum", "std": "group"},
    {"aggregation": "gdpo"},
]
KIND_IDS = ["sum-global", "sum-group", "gdpo"]


def random_scores(groups: int, size: int, rewards: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups * size, rewards, generator=generator, dtype=torch.float64)
    ids = torch.arange(groups).repeat_interleave(size) * 7 - 3
    order = torch.randperm(groups * size, generator=generator)
    return (scores * torch.tensor([0.01, 1.0, 30.0])[:rewards])[order], ids[order]


@requires_shared
@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("std", ["global", "group"])
def test_golden_sum(index: int, std: Any) -> None:
    meta, tensors = golden("algorithms/advantages_sum")
    assert len(meta["cases"]) == 7
    t = case_tensors(tensors, index)
    result = group_advantages(t["scores"], t["groups"], weights=t["weights"], std=std)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, t[f"advantages_{std}_std"], atol=1e-9, rtol=0)


@requires_shared
@pytest.mark.parametrize("index", range(7))
def test_golden_gdpo(index: int) -> None:
    meta, tensors = golden("algorithms/advantages_gdpo")
    assert len(meta["cases"]) == 7
    t = case_tensors(tensors, index)
    result = group_advantages(t["scores"], t["groups"], weights=t["weights"].tolist(), aggregation="gdpo")
    torch.testing.assert_close(result, t["advantages"], atol=1e-9, rtol=0)


def test_worked_example_with_the_std_of_the_group_and_of_all() -> None:
    scores, groups = torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([5, 5, 2, 2])
    assert group_advantages(scores, groups, std="group").tolist() == [-1.0, 1.0, -1.0, 1.0]
    pooled = (((scores - 6.5) ** 2).mean() ** 0.5).item()
    expected = torch.tensor([-1.0, 1.0, -2.0, 2.0], dtype=torch.float64) / pooled
    torch.testing.assert_close(group_advantages(scores, groups), expected, atol=1e-7, rtol=0)


def test_gdpo_ignores_the_scale_of_a_reward_and_sum_does_not() -> None:
    scores, groups = random_scores(4, 6, 2)
    scaled = scores * torch.tensor([1.0, 100.0])
    gdpo = [group_advantages(s, groups, aggregation="gdpo") for s in (scores, scaled)]
    torch.testing.assert_close(gdpo[0], gdpo[1], atol=1e-9, rtol=0)
    total = [group_advantages(s, groups) for s in (scores, scaled)]
    assert (total[0] - total[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_row_order_group_ids_and_offsets_do_not_matter(kind: dict[str, Any]) -> None:
    scores, groups = random_scores(5, 4, 3)
    expected = group_advantages(scores, groups, **kind)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = group_advantages(scores[order], 10**12 - 5 * groups[order], **kind)
    torch.testing.assert_close(shuffled, expected[order], atol=1e-12, rtol=0)
    if kind != KINDS[0]:  # the pooled std of raw sums sees the offsets between groups
        moved = group_advantages(scores + groups[:, None].double(), groups, **kind)
        torch.testing.assert_close(moved, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 20.05])
def test_flat_groups_and_lone_rows_get_exactly_zero(kind: dict[str, Any], constant: float) -> None:
    # The mean of some of these constants over 3, 6 or 7 rows rounds off them.
    scores, groups = random_scores(3, 5, 2)
    flat = torch.full((17, 2), constant, dtype=torch.float64)
    flat_groups = torch.tensor([100] * 3 + [101] * 6 + [102] * 7 + [103])
    result = group_advantages(torch.cat([scores, flat]), torch.cat([groups, flat_groups]), weights=[1, 0.3], **kind)
    assert result[15:].tolist() == [0.0] * 17
    assert (result[:15] != 0).all()
    assert result[:15].sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("how", ["nan", "infinite", "row mask", "entry mask"])
def test_invalid_rows_leave_no_trace(kind: dict[str, Any], how: str) -> None:
    scores, groups = random_scores(4, 5, 3)
    bad = torch.tensor([0, 7, 8, 13])
    rest = torch.ones(20, dtype=torch.bool).index_fill(0, bad, False)
    expected = torch.zeros(20, dtype=torch.float64)
    expected[rest] = group_advantages(scores[rest], groups[rest], **kind)
    broken, valid = scores.clone(), None
    if how in ("nan", "infinite"):
        broken[bad, 1] = NAN if how == "nan" else torch.inf
    else:
        broken[bad] = 1e6
        valid = rest if how == "row mask" else torch.ones(20, 3, dtype=torch.bool)
        valid[bad, ...] = False
    result = group_advantages(broken, groups, valid=valid, **kind)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    assert result[bad].tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_one_masked_reward_invalidates_its_whole_row(kind: dict[str, Any]) -> None:
    scores, groups = random_scores(3, 4, 2)
    entry = torch.ones(12, 2, dtype=torch.bool)
    entry[5, 1] = False
    by_entry = group_advantages(scores, groups, valid=entry, **kind)
    by_row = group_advantages(scores, groups, valid=entry.all(1), **kind)
    assert torch.equal(by_entry, by_row)
    assert by_entry[5].item() == 0


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_a_group_left_with_one_valid_row_gets_zero(kind: dict[str, Any]) -> None:
    scores = torch.tensor([[1.0], [NAN], [NAN], [2.0], [3.0]])
    result = group_advantages(scores, torch.tensor([0, 0, 0, 1, 1]), **kind)
    assert result[:3].tolist() == [0.0] * 3
    assert result[3] < 0 < result[4]


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_nothing_valid_and_nothing_at_all(kind: dict[str, Any]) -> None:
    assert group_advantages(torch.full((4, 2), NAN), torch.tensor([0, 0, 1, 1]), **kind).tolist() == [0.0] * 4
    empty = group_advantages(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), **kind)
    assert empty.shape == (0,)
    assert empty.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_a_reward_of_weight_zero_takes_no_part_even_when_it_fails(kind: dict[str, Any]) -> None:
    scores, groups = random_scores(3, 4, 2)
    expected = group_advantages(scores[:, :1], groups, **kind)
    scores[2:7, 1] = NAN
    result = group_advantages(scores, groups, weights=[1.0, 0.0], **kind)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


def test_a_large_common_offset_does_not_cancel() -> None:
    scores, groups = random_scores(4, 6, 1)
    result = group_advantages(scores + 1e6, groups)
    torch.testing.assert_close(result, group_advantages(scores, groups), atol=1e-6, rtol=0)


def test_half_precision_scores_are_reduced_in_float64_without_gradient() -> None:
    scores = torch.tensor([[1000.0], [1001.0], [1003.0]], dtype=torch.float16, requires_grad=True)
    result = group_advantages(scores, torch.zeros(3, dtype=torch.int32), std="group")
    values = torch.tensor([-4 / 3, -1 / 3, 5 / 3], dtype=torch.float64)
    torch.testing.assert_close(result, values / values.pow(2).mean().sqrt(), atol=1e-12, rtol=0)
    assert not result.requires_grad


# --- ranks ------------------------------------------------------------------------------------------------------------


class SimulatedRanks:
    """Runs one function per rank in threads whose `reduce` sums over all of them."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=30)
        self.parts: list[Tensor] = [torch.empty(0)] * world
        self.calls = [0] * world

    def reduce(self, rank: int, value: Tensor) -> Tensor:
        assert value.dtype == torch.float64
        self.calls[rank] += 1
        self.parts[rank] = value
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()
        return total

    def run(self, shards: list[tuple[Tensor, Tensor]], **kind: Any) -> list[Tensor]:
        results = [torch.empty(0)] * len(shards)

        def work(rank: int) -> None:
            results[rank] = group_advantages(*shards[rank], reduce=lambda value: self.reduce(rank, value), **kind)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shards))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_two_ranks_equal_one_process(kind: dict[str, Any], weights: list[float] | None) -> None:
    scores, groups = random_scores(6, 4, 3)
    scores[3, 1] = NAN
    ids = groups.unique()
    on_first = torch.isin(groups, ids[:2])  # uneven: 2 groups here, 4 there
    expected = group_advantages(scores, groups, weights=weights, **kind)
    ranks = SimulatedRanks(2)
    shards = [(scores[mask], groups[mask]) for mask in (on_first, ~on_first)]
    first, second = ranks.run(shards, weights=weights, **kind)
    torch.testing.assert_close(first, expected[on_first], atol=1e-12, rtol=0)
    torch.testing.assert_close(second, expected[~on_first], atol=1e-12, rtol=0)
    if kind != KINDS[1]:
        alone = group_advantages(scores[on_first], groups[on_first], weights=weights, **kind)
        assert (alone - first).abs().max() > 1e-6  # the pooled std did cross ranks


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=["sum-global", "gdpo"])
def test_a_rank_without_valid_rows_takes_part_in_every_reduction(kind: dict[str, Any]) -> None:
    scores, groups = random_scores(3, 4, 2)
    ranks = SimulatedRanks(2)
    first, second = ranks.run([(scores, groups), (torch.full((4, 2), NAN), torch.full((4,), 99))], **kind)
    torch.testing.assert_close(first, group_advantages(scores, groups, **kind), atol=1e-12, rtol=0)
    assert second.tolist() == [0.0] * 4
    assert ranks.calls[0] == ranks.calls[1] > 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, r"weights is \[1\]; it must be \[2\]"),
        ({"weights": torch.ones(2, 1)}, r"weights is \[2, 1\]; it must be \[2\]"),
        ({"weights": [1.0, NAN]}, "every weight must be finite"),
        ({"aggregation": "mean"}, """aggregation is 'mean'; choose "sum" or "gdpo\""""),
        ({"std": "batch"}, """std is 'batch'; choose "global" or "group\""""),
        ({"aggregation": "gdpo", "std": "group"}, 'use std="global"'),
        ({"groups": torch.zeros(3, dtype=torch.long)}, r"groups is \[3\]; it must be \[4\]"),
        ({"groups": torch.zeros(4, 1, dtype=torch.long)}, r"groups is \[4, 1\]; it must be \[4\]"),
        ({"groups": torch.zeros(4)}, "group ids must be integers"),
        ({"scores": torch.zeros(4)}, r"scores is \[4\]; it must be \[B, R\]"),
        ({"valid": torch.ones(4)}, r"valid is torch\.float32 \[4\]; it must be torch\.bool"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, r"valid is torch\.bool \[2\]"),
        ({"valid": torch.ones(4, 1, dtype=torch.bool)}, r"\[4\] or \[4, 2\] like scores"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"scores": torch.zeros(4, 2), "groups": torch.zeros(4, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        group_advantages(call.pop("scores"), call.pop("groups"), **call)
