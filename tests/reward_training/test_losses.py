"""The losses of language reward models against the golden numbers, and against what is known in closed form."""

import math

import pytest
import torch

from tests.shared import case_tensors, golden, requires_shared
from tiltflow.errors import ConfigError, TrainingError
from tiltflow.reward_training.losses import (
    bradley_terry,
    bradley_terry_metrics,
    bradley_terry_sums,
    masked_mse,
    masked_mse_metrics,
    masked_mse_sums,
)

DTYPES = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 1e-6, id="float32")]
NEMO_KEYS = ("loss", "acc", "rewards_chosen_mean", "rewards_rejected_mean", "rewards_all_mean", "rewards_all_std")


def case_of(name, index, dtype):
    meta, tensors = golden(f"algorithms/{name}")
    floats = {key: value.to(dtype) for key, value in case_tensors(tensors, index).items()}
    return meta["cases"][index], floats


def close(found, expected, tolerance):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), expected.double(), atol=tolerance, rtol=tolerance
    )


def add(parts):
    return {key: sum(float(part[key]) for part in parts) for key in parts[0]}


# --- golden numbers --------------------------------------------------------------------------------------------------


@requires_shared
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_masked_pairs_in_micro_batches(index, dtype, tolerance):
    case, t = case_of("bradley_terry", index, dtype)
    chosen, rejected = (t[f"rewards_{side}"].clone().requires_grad_() for side in ("chosen", "rejected"))
    places = torch.arange(len(chosen)).split(case["micro_batch_sizes"])
    losses = [bradley_terry(chosen[part], rejected[part], mask=t["loss_mask"][part])[0] for part in places]
    close(torch.stack(losses).detach(), t["micro_batch_loss"], tolerance)
    sum(losses).backward()
    close(chosen.grad, t["grad_micro_batch_loss_chosen"], tolerance)
    close(rejected.grad, t["grad_micro_batch_loss_rejected"], tolerance)
    valid = (t["loss_mask"].sum(1) > 0).to(dtype)
    sums = add([bradley_terry_sums(chosen[p], rejected[p], weights=valid[p])[1] for p in places])
    found = bradley_terry_metrics(sums)
    assert sums["pairs"] == case["expected"]["weights"]
    close(found["loss"], t["loss"], tolerance)
    close(found["acc"], t["acc"], tolerance)


@requires_shared
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_metrics_of_one_masked_batch(index, dtype, tolerance):
    case, t = case_of("bradley_terry", index, dtype)
    loss, metrics = bradley_terry(t["rewards_chosen"], t["rewards_rejected"], mask=t["loss_mask"])
    assert set(metrics) == set(NEMO_KEYS)
    close(loss, t["loss"], tolerance)
    # The reference's deviation is a mean over micro-batches, which is exact for one.
    names = NEMO_KEYS if len(case["micro_batch_sizes"]) == 1 else NEMO_KEYS[:-1]
    for name in names:
        close(metrics[name], t[name], tolerance)


@requires_shared
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["regular_bt", "margin_bt", "scaled_bt"])
def test_strength_of_preference(name, dtype, tolerance):
    _, t = case_of("bradley_terry", 4, dtype)
    rewards = torch.stack([t["reward_first"], t["reward_second"]], dim=1).requires_grad_()
    first_is_better = t["label"] < 0
    chosen = torch.where(first_is_better, rewards[:, 0], rewards[:, 1])
    rejected = torch.where(first_is_better, rewards[:, 1], rewards[:, 0])
    strength = t["label"].abs()
    given = {"regular_bt": {}, "margin_bt": {"margin": strength}, "scaled_bt": {"scale": strength}}[name]
    losses = [
        bradley_terry(chosen[i : i + 1], rejected[i : i + 1], **{key: value[i : i + 1] for key, value in given.items()})
        for i in range(len(chosen))
    ]
    found = torch.stack([loss for loss, _ in losses])
    close(found.detach(), t[name], tolerance)
    found.sum().backward()
    close(rewards.grad, t[f"grad_{name}"], tolerance)


@requires_shared
@pytest.mark.parametrize("index", range(5, 9))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_margins_and_centring(index, dtype, tolerance):
    case, t = case_of("bradley_terry", index, dtype)
    chosen, rejected = (t[f"rewards_{side}"].clone().requires_grad_() for side in ("chosen", "rejected"))
    coefficient = case["center_rewards_coefficient"]
    loss, metrics = bradley_terry(chosen, rejected, margin=t.get("margins"), center_coefficient=coefficient)
    loss.backward()
    close(loss.detach(), t["loss"], tolerance)
    close(chosen.grad, t["grad_chosen"], tolerance)
    close(rejected.grad, t["grad_rejected"], tolerance)
    assert math.isclose(metrics["acc"], case["expected"]["accuracy"], abs_tol=1e-6)
    assert math.isclose(metrics["rewards_all_mean"], case["expected"]["mean_reward"], abs_tol=1e-6)


@requires_shared
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_masked_squares(index, dtype, tolerance):
    case, t = case_of("regression_mse", index, dtype)
    ignored = case["loss_mask_val"]
    predictions = t["predictions"].clone().requires_grad_()
    loss, metrics = masked_mse(predictions, t["labels"], ignore_value=ignored)
    loss.backward()
    close(loss.detach(), t["loss"], tolerance)
    close(metrics["loss"], t["loss"], tolerance)
    close(predictions.grad, t["grad_predictions"], tolerance)
    cut = case["split_at_row"]
    halves = [
        masked_mse_sums(t["predictions"][part], t["labels"][part], ignore_value=ignored)[1]
        for part in (slice(cut), slice(cut, None))
    ]
    close(masked_mse_metrics(add(halves[:1]))["loss"], t["first_half_loss"], tolerance)
    close(masked_mse_metrics(add(halves[1:]))["loss"], t["second_half_loss"], tolerance)
    close(masked_mse_metrics(add(halves))["loss"], t["global_loss"], tolerance)
    assert add(halves)["labels"] == case["valid_labels"]


# --- in closed form --------------------------------------------------------------------------------------------------


def test_metrics_from_sums_are_those_of_all_pairs_however_they_are_cut():
    chosen, rejected = torch.randn(11, dtype=torch.float64) + 300, torch.randn(11, dtype=torch.float64) + 300
    _, whole = bradley_terry(chosen, rejected)
    ones = torch.ones(11)
    parts = [slice(0, 4), slice(4, 10), slice(10, 11)]
    found = bradley_terry_metrics(add([bradley_terry_sums(chosen[p], rejected[p], weights=ones[p])[1] for p in parts]))
    assert set(found) == set(whole)
    for name, value in whole.items():
        assert math.isclose(found[name], value, rel_tol=1e-9)


def test_pairs_without_weight_count_nowhere_even_if_they_are_not_finite():
    chosen = torch.tensor([1.0, torch.nan, 0.5], requires_grad=True)
    rejected = torch.tensor([0.0, torch.inf, 2.0])
    loss, sums = bradley_terry_sums(chosen, rejected, weights=torch.tensor([1.0, 0.0, 1.0]), center_coefficient=0.1)
    expected, metrics = bradley_terry(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0]), center_coefficient=0.1)
    loss.backward()
    assert chosen.grad is not None and chosen.grad[1] == 0 and chosen.grad.isfinite().all()
    assert math.isclose(loss.item(), 2 * expected.item(), rel_tol=1e-6)
    found = bradley_terry_metrics({key: value.item() for key, value in sums.items()})
    assert all(math.isclose(found[name], metrics[name], rel_tol=1e-6) for name in NEMO_KEYS)


def test_no_pair_at_all_costs_nothing_and_says_nothing():
    rewards = torch.zeros(2, requires_grad=True)
    loss, metrics = bradley_terry(rewards, rewards + 1, mask=torch.zeros(2))
    loss.backward()
    assert loss.item() == 0 and rewards.grad is not None and rewards.grad.abs().sum() == 0
    assert metrics["acc"].isnan()
    _, sums = bradley_terry_sums(rewards, rewards, weights=torch.zeros(2))
    assert all(math.isnan(value) for value in bradley_terry_metrics({k: v.item() for k, v in sums.items()}).values())


def test_soft_label_is_cross_entropy_whose_minimum_is_the_log_odds():
    p = torch.tensor([0.7, 0.2], dtype=torch.float64)
    difference = torch.logit(p).requires_grad_()
    loss, metrics = bradley_terry(difference, torch.zeros_like(difference), labels=p)
    loss.backward()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert math.isclose(loss.item(), entropy.item(), rel_tol=1e-12)
    assert difference.grad is not None and difference.grad.abs().max() < 1e-12
    assert metrics["acc"] == 1  # the second pair's rejected one is the better, and has the higher reward


def test_tie_is_log_two_at_equal_rewards_and_is_left_out_of_the_accuracy():
    loss, metrics = bradley_terry(torch.tensor([3.0, 1.0]), torch.tensor([3.0, 0.0]), labels=torch.tensor([0.5, 1.0]))
    assert math.isclose(loss.item(), (math.log(2) + math.log1p(math.exp(-1))) / 2, rel_tol=1e-6)
    assert metrics["acc"] == 1


def test_the_three_outcomes_with_a_tie_threshold_are_all_that_can_happen():
    difference, zero = torch.linspace(-3, 3, 7, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for one in difference:
        outcomes = [
            bradley_terry(one[None], zero, labels=torch.tensor([p]), tie_threshold=0.4)[0].neg().exp()
            for p in (1.0, 0.5, 0.0)
        ]
        assert math.isclose(sum(outcomes).item(), 1.0, rel_tol=1e-12)
    with pytest.raises(ConfigError, match="tie_threshold=0: use a positive number"):
        bradley_terry(zero, zero, tie_threshold=0.0)


def test_half_precision_is_raised():
    loss, _ = bradley_terry(torch.tensor([20.0], dtype=torch.bfloat16), torch.tensor([19.0], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), math.log1p(math.exp(-1)), rel_tol=1e-6)


def test_certain_pairs_have_a_finite_loss_and_gradient():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = bradley_terry(chosen, torch.zeros(2))
    loss.backward()
    assert math.isclose(loss.item(), 5e3, rel_tol=1e-6)
    assert chosen.grad is not None and chosen.grad.tolist() == [0.0, -0.5]


def test_batch_without_any_rating_is_an_error_but_not_as_a_sum():
    labels = torch.full((2, 3), -100.0)
    with pytest.raises(TrainingError, match="all 6 labels of the batch are -100"):
        masked_mse(torch.zeros(2, 3), labels)
    loss, sums = masked_mse_sums(torch.zeros(2, 3), labels)
    assert loss.item() == 0
    assert math.isnan(masked_mse_metrics({k: v.item() for k, v in sums.items()})["loss"])


def test_ratings_of_rows_without_weight_count_nowhere():
    predictions = torch.tensor([[1.0, 2.0], [torch.nan, 5.0]], requires_grad=True)
    labels = torch.tensor([[0.0, -100.0], [1.0, 1.0]])
    loss, sums = masked_mse_sums(predictions, labels, weights=torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 1 and sums["labels"] == 1 and sums["errors"] == 1
    assert predictions.grad is not None and predictions.grad.tolist() == [[2.0, 0.0], [0.0, 0.0]]
