"""The preference losses: golden numbers, closed forms, and one answer for any number of processes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.invariant.runs import launch
from tests.shared import case_tensors, golden, requires_shared
from tiltflow.errors import TrainingError
from tiltflow.reward_training import preference_kl
from tiltflow.reward_training.gathering import gather_rows
from tiltflow.reward_training.preference import agreement, pickscore_criterion, preference_kl_rows


@requires_shared
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index", range(5))
def test_golden_preference_kl(index: int, dtype: torch.dtype) -> None:
    meta, tensors = golden("algorithms/preference_kl")
    assert len(meta["cases"]) == 5
    case = case_tensors(tensors, index)
    rewards_0, rewards_1 = (case[name].to(dtype).requires_grad_() for name in ("rewards_0", "rewards_1"))
    loss, metrics = preference_kl(rewards_0, rewards_1, case["labels"].to(dtype))
    loss.backward()
    exact = dtype == torch.float64
    torch.testing.assert_close(loss.detach().double(), case["loss"], atol=1e-12 if exact else 1e-6, rtol=0)
    torch.testing.assert_close(metrics["accuracy"].double(), case["accuracy"], atol=1e-12, rtol=0, equal_nan=True)
    for found, name in ((rewards_0.grad, "grad_rewards_0"), (rewards_1.grad, "grad_rewards_1")):
        assert found is not None
        torch.testing.assert_close(found.double(), case[name], atol=1e-12 if exact else 1e-6, rtol=0)


@requires_shared
@pytest.mark.parametrize("index", range(2))
def test_golden_pickscore_criterion(index: int) -> None:
    meta, tensors = golden("algorithms/pickscore_criterion")
    assert [case["in_batch_negatives"] for case in meta["cases"]] == [False, True]
    case = case_tensors(tensors, index)
    names = ("text_features", "image_0_features", "image_1_features")
    features = [case[name].requires_grad_() for name in names]
    loss = pickscore_criterion(
        *features,
        torch.stack([case["label_0"], case["label_1"]], dim=-1),
        logit_scale=meta["cases"][index]["logit_scale"],
        num_examples_per_prompt=case["num_examples_per_prompt"],
        in_batch_negatives=meta["cases"][index]["in_batch_negatives"],
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], atol=1e-8, rtol=0)
    for feature, name in zip(features, names, strict=True):
        assert feature.grad is not None
        torch.testing.assert_close(feature.grad, case[f"grad_{name}"], atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("label", "rewards", "expected"),
    [
        ((1.0, 0.0), (50.0, 0.0), -0.0010208),
        ((0.5, 0.5), (3.0, 3.0), 0.0),
        ((0.0, 1.0), (0.0, 0.0), math.log(2) - 0.0010208),
    ],
)
def test_closed_forms(label: tuple[float, float], rewards: tuple[float, float], expected: float) -> None:
    loss, _ = preference_kl(torch.tensor(rewards[:1]), torch.tensor(rewards[1:]), torch.tensor([label]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_rows_add_up_to_the_mean_however_they_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]).double()
    loss, _ = preference_kl(*rewards, labels)
    parts = [preference_kl_rows(*rewards[:, part], labels[part]).sum() for part in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(loss, (parts[0] + parts[1]) / 7, atol=1e-12, rtol=0)


def test_ties_and_equal_rewards_are_no_agreement() -> None:
    rewards_0, rewards_1 = torch.tensor([1.0, 1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    labels = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1], [1.0, 0.0]])
    decided, agreeing = agreement(rewards_0, rewards_1, labels)
    assert (decided.tolist(), agreeing.tolist()) == ([0, 1, 1, 1], [0, 0, 1, 0])
    _, metrics = preference_kl(rewards_0[:1], rewards_1[:1], labels[:1])
    assert metrics["accuracy"].isnan()


def test_half_precision_is_computed_in_float32() -> None:
    rewards = torch.randn(2, 5)
    labels = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    loss, _ = preference_kl(*rewards.bfloat16(), labels)
    exact, _ = preference_kl(*rewards.bfloat16().float(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()


def test_a_pair_without_its_prompts_weight_counts_like_any_other() -> None:
    generator = torch.Generator().manual_seed(1)
    features = [torch.nn.functional.normalize(torch.randn(4, 3, generator=generator), dim=-1) for _ in range(3)]
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    alike = pickscore_criterion(*features, labels, logit_scale=10.0, num_examples_per_prompt=torch.full((4,), 3))
    torch.testing.assert_close(pickscore_criterion(*features, labels, logit_scale=10.0), alike)
    rewards = [10 * (features[0] * image).sum(dim=-1) for image in features[1:]]
    hard = labels[:, 0] != labels[:, 1]
    rows = preference_kl_rows(*rewards, labels)[~hard]  # on ties both losses are the same number
    tied = pickscore_criterion(*(f[~hard] for f in features), labels[~hard], logit_scale=10.0)
    torch.testing.assert_close(rows.mean().float(), tied, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "shapes", [((3,), (2,), (3, 2)), ((3, 1), (3, 1), (3, 2)), ((3,), (3,), (3,)), ((3,), (3,), (2, 2))]
)
def test_wrong_shapes_are_told(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(TrainingError, match=r"must be \[B\], \[B\] and \[B, 2\]"):
        preference_kl(*(torch.zeros(shape) for shape in shapes))


def test_wrong_feature_shapes_are_told() -> None:
    for contrast in (False, True):
        with pytest.raises(TrainingError, match=r"must be \[B, D\] and \[B, 2\]"):
            pickscore_criterion(
                torch.zeros(3, 4),
                torch.zeros(3, 5),
                torch.zeros(3, 4),
                torch.zeros(3, 2),
                logit_scale=1.0,
                in_batch_negatives=contrast,
            )


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    gathered, place = gather_rows(rows)
    assert gathered is rows
    assert place == 0


PROGRAM = """
import json, sys
import torch
from tiltflow.reward_training.gathering import gather_rows
from tiltflow.reward_training.preference import Columns, contrastive_rows
from tiltflow.runtime.distributed import Distributed

group = Distributed()
generator = torch.Generator().manual_seed(0)
weights = torch.nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
inputs = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
labels = torch.tensor([[1, 0], [0.5, 0.5], [0, 1], [1, 0], [0, 1]], dtype=torch.float64)
mine = slice(None) if group.world_size == 1 else (slice(0, 2) if group.rank == 0 else slice(2, 5))
own = Columns(*(torch.nn.functional.normalize(part[mine] @ weights, dim=-1) for part in inputs))
texts, place = gather_rows(own.texts)
columns = Columns(texts, gather_rows(own.images_0)[0], gather_rows(own.images_1)[0])
loss = contrastive_rows(own, columns, labels[mine], logit_scale=7.0, offset=place).sum()
loss.backward()
total, gradient = group.sum(loss.detach()), group.sum(weights.grad)
if group.is_main:
    print(json.dumps([total.item(), gradient.flatten().tolist()]))
group.close()
"""


def test_negatives_of_all_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found: list[Tensor] = []
    for extra in ([], launcher):
        done = launch([sys.executable, *extra, str(program)])
        loss, gradient = json.loads(done.stdout)
        found.append(torch.tensor([loss, *gradient], dtype=torch.float64))
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
