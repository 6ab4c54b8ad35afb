"""The evaluation with ties: golden numbers, closed forms, and whole sets of pairs."""

import math

import numpy as np
import pytest
import torch

from tests.data.test_image_preferences import SKIP, write_lines
from tests.reward_training.pairs import tiny_model
from tests.shared import case_tensors, golden, requires_shared
from tiltflow.data.image_preferences import read_image_preferences
from tiltflow.errors import DataError
from tiltflow.reward_training.thresholds import (
    THRESHOLDS,
    agreements,
    evaluate_with_ties,
    pair_rewards,
    probabilities,
    random_baseline,
    threshold_accuracies,
    tie_scores,
)


@requires_shared
@pytest.mark.parametrize("index", range(3))
def test_golden_protocol(index: int) -> None:
    meta, tensors = golden("algorithms/tie_threshold_eval")
    assert len(meta["cases"]) == 3
    case = {name: tensor.numpy() for name, tensor in case_tensors(tensors, index).items()}
    assert list(THRESHOLDS) == pytest.approx(case["thresholds"].tolist(), abs=1e-12)
    accuracies = threshold_accuracies(case["val_probs"], case["val_labels"])
    np.testing.assert_allclose(accuracies, case["val_accuracies"], atol=1e-9, rtol=0)
    assert THRESHOLDS[int(accuracies.argmax())] == pytest.approx(case["best_threshold"].item(), abs=1e-12)
    if "test_probs" not in case:
        return
    tests = threshold_accuracies(case["test_probs"], case["test_labels"])
    np.testing.assert_allclose(tests, case["test_accuracies_all_thresholds"], atol=1e-9, rtol=0)
    baseline = random_baseline(case["val_labels"])
    np.testing.assert_allclose(baseline, case["random_baseline_val"], atol=1e-9, rtol=0)
    found = evaluate_with_ties(
        case["val_probs"], case["val_labels"], test_probs=case["test_probs"], test_labels=case["test_labels"]
    )
    assert found.threshold == pytest.approx(case["best_threshold"].item(), abs=1e-12)
    assert found.test.value == pytest.approx(case["test_accuracy"].item(), abs=1e-9)
    assert found.validation.value == pytest.approx(case["val_accuracies"].max(), abs=1e-9)
    assert found.test.low < found.test.value < found.test.high
    assert found.test.count == len(case["test_probs"])


def test_scores_of_every_kind_of_pair() -> None:
    probs = [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.55, 0.45], [0.5, 0.5]]
    labels = [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5], [1, 0], [0, 1]]
    assert tie_scores(probs, labels, 0.2).tolist() == [1, 0, 0.5, 1, 0.5, 0.5]
    assert tie_scores(probs, labels, 0.0).tolist() == [1, 0, 0.5, 0.5, 1, 0.5]


def test_probabilities_are_a_softmax_that_never_overflows() -> None:
    first, second = np.array([0.0, 3.0, -1e4]), np.array([0.0, 1.0, 1e4])
    expected = torch.softmax(torch.tensor(np.stack([first, second], axis=-1)), dim=-1).numpy()
    np.testing.assert_allclose(probabilities(first, second), expected, atol=1e-15)


def test_the_baseline_is_what_chance_scores() -> None:
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(60_000)[:, None] < 0.3, 0.5, np.array([[1.0, 0.0]]))
    first = rng.random(60_000)
    found = threshold_accuracies(np.stack([first, 1 - first], axis=-1), labels)
    np.testing.assert_allclose(found, random_baseline(labels), atol=0.01)


def test_accuracy_leaves_ties_out() -> None:
    right, decided = agreements([1, 1, 2, 0, 0], [0, 1, 1, 1, 9], [[1, 0], [1, 0], [0.9, 0.1], [1, 0], [0.5, 0.5]])
    assert decided.tolist() == [True] * 4 + [False]
    assert right[decided].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("shape", [(0, 2), (3,), (3, 3)])
def test_wrong_shapes_are_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"must both be \[N, 2\]"):
        tie_scores(np.zeros(shape), np.zeros(shape), 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_no_scores(value: float) -> None:
    labels, probs = [[1, 0], [1, 0], [0.5, 0.5]], [[0.9, 0.1], [value, 0.1], [0.5, 0.5]]
    with pytest.raises(
        DataError, match=r"rewards_0\[1\] is (nan|-?inf), as at 1 more places: rewards and labels must be"
    ):
        probabilities([1.0, value, value], [0.0, 0.0, 0.0])
    with pytest.raises(DataError, match=r"rewards_1\[2\] is"):
        agreements([1.0, 1.0, 1.0], [0.0, 0.0, value], labels)
    with pytest.raises(DataError, match=r"probs\[1\] is \[ *(nan|-?inf)"):
        threshold_accuracies(probs, labels)
    with pytest.raises(DataError, match=r"probs\[1\] is"):
        evaluate_with_ties([[0.9, 0.1]] * 3, labels, test_probs=probs, test_labels=labels)
    for call in (lambda: random_baseline(probs), lambda: tie_scores([[0.9, 0.1]] * 3, probs, 0.1)):
        with pytest.raises(DataError, match=r"labels\[1\] is"):
            call()


def test_rewards_of_a_whole_set(tmp_path) -> None:
    path = write_lines(tmp_path, {}, {"image_0": "images/gone.png"}, {"image_0": "images/2.png"}, {"prompt": "a dog"})
    pairs, model = read_image_preferences(str(path), SKIP), tiny_model()
    first, second, labels = pair_rewards(model, pairs, batch_size=3)
    assert model.training
    assert labels.tolist() == [[1, 0]] * 3
    model.eval()
    batch = pairs.batch([3], [1])
    with torch.no_grad():
        expected = [model.get_reward(batch[key], batch["prompt"]).item() for key in ("img_0", "img_1")]
    assert (first[2], second[2]) == pytest.approx(expected, abs=1e-4)
