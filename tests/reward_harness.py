"""One harness for every reward, built in or user-made: what holds for all of them, whatever they measure.

A `Case` says how to build a reward and what to show it; every function of `CHECKS` takes a built reward with its case.
"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tiltflow.rewards import (
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardEngine,
    RewardModel,
    RewardModelOutput,
    build_reward_model,
)
from tiltflow.scorers import Scorer
from tiltflow.scorers.clip_backbone import ClipBackbone
from tiltflow.types import Prompt, RewardTable, SampleBatch


@dataclass(frozen=True)
class Case:
    """One reward, tiny enough to be run, with samples that it tells apart."""

    name: str
    arguments: RewardArguments
    write: Callable[[Path], object] | None  # writes its tiny weights into the models folder
    prompts: Sequence[Prompt]  # B, with the metadata that it needs
    images: Callable[[], Tensor]  # [B, 3, H, W] on the 8-bit grid: k / 255
    groups: Sequence[int]  # B
    network: Callable[[Any], nn.Module] | None = None  # finds it in the reward; a Scorer where that is differentiable
    tolerance: float = 0.0  # absolute: how much a score may depend on its batch
    bfloat16: float = 0.0  # absolute: how far bfloat16 may be from float32
    exempt: Mapping[str, str] = field(default_factory=dict[str, str])  # check -> why it does not apply
    conditions: Callable[[int], Sequence[Tensor]] | None = None  # group -> its condition images, each [3, H, W]
    arrange: Callable[[pytest.MonkeyPatch], object] | None = None  # what else must be so, such as a judge that answers

    def build(self, **changes: Any) -> RewardModel:
        """Build the reward, with other arguments if asked; its weights must have been written."""
        return build_reward_model(self.arguments.model_copy(update=changes))

    def samples(self, rows: Sequence[int] | None = None) -> SampleBatch:
        """Return all samples or some, as new tensors each time: scorers know again what they have seen."""
        rows = range(len(self.prompts)) if rows is None else rows
        return SampleBatch(
            prompts=[self.prompts[row] for row in rows],
            groups=torch.tensor([self.groups[row] for row in rows], dtype=torch.int64),
            latents=torch.zeros(len(rows), 1, 1, 1),
            images=self.images()[list(rows)].clone(),
        )


# --- asking a reward -------------------------------------------------------------------------------------------------


def ask(case: Case, reward: RewardModel, samples: SampleBatch, *, batch_size: int = 16) -> RewardTable:
    """Score samples through the engine, failures masked, with nothing remembered of what was scored before."""
    if case.network is not None:
        for module in case.network(reward).modules():
            if isinstance(module, ClipBackbone):
                module.forget()
    arguments = reward.config.model_copy(update={"batch_size": batch_size, "on_error": "mask"})
    groups = samples.groups.tolist()
    conditions = None if case.conditions is None else [case.conditions(group) for group in groups]
    with RewardEngine([arguments], factory=lambda _: reward).begin() as scoring:
        scoring.add(samples.prompts, groups, images=samples.images, condition_images=conditions)
        return scoring.finish()


def scores(case: Case, reward: RewardModel, rows: Sequence[int] | None = None, *, batch_size: int = 16) -> Tensor:
    """Return the scores of the case's samples or of some, `[B]`, all of which must succeed."""
    table = ask(case, reward, case.samples(rows), batch_size=batch_size)
    assert table.failures == ()
    assert table.scores.dtype == torch.float32
    return table.scores[:, 0]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare scores, and see to it that the tolerance is one: small beside their differences."""
    assert tolerance == 0 or tolerance < (expected.max() - expected.min()) / 4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_telling_apart(case: Case, reward: RewardModel) -> None:
    """The samples have different scores: without that, the other checks would show nothing."""
    assert scores(case, reward).unique().numel() > 1
    assert len(case.prompts) > len(set(case.groups)) > 1


def check_batch_invariance(case: Case, reward: RewardModel) -> None:
    """A score does not depend on what else is in its batch; a groupwise one not on other groups."""
    expected = scores(case, reward)
    if not isinstance(reward, GroupwiseRewardModel):
        close(scores(case, reward, batch_size=1), expected, case.tolerance)
        close(scores(case, reward, batch_size=len(expected) - 1), expected, case.tolerance)
        return
    alone = torch.empty_like(expected)
    for group in set(case.groups):
        rows = [row for row, other in enumerate(case.groups) if other == group]
        alone[rows] = scores(case, reward, rows)
    close(alone, expected, case.tolerance)
    close(scores(case, case.build(batch_size=2)), expected, case.tolerance)


def check_order_invariance(case: Case, reward: RewardModel) -> None:
    """Scores follow their samples into whatever order, groups interleaved."""
    expected = scores(case, reward)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(1)).tolist()
    assert order != sorted(order)
    close(scores(case, reward, order), expected[order], case.tolerance)


def check_pil_equals_tensor(case: Case, reward: RewardModel) -> None:
    """Images of 8 bits have the same score as pictures and as tensors, whichever the reward reads."""
    other = in_the_other_form(reward)
    assert other.use_tensor_inputs != reward.use_tensor_inputs
    samples = case.samples()
    assert torch.equal((samples.images * 255).round() / 255, samples.images)
    table = ask(replace(case, network=None), other, samples)
    assert table.failures == ()
    close(table.scores[:, 0], scores(case, reward), case.tolerance)


def check_dtype(case: Case, reward: RewardModel) -> None:
    """In bfloat16 the scores are about those of float32, and float32 themselves."""
    half = case.build(dtype="bfloat16")
    assert case.network is not None
    dtypes = {weight.dtype for weight in case.network(half).parameters() if weight.ndim > 1}
    assert torch.bfloat16 in dtypes
    close(scores(case, half), scores(case, reward), case.bfloat16)


def check_pickling(case: Case, reward: RewardModel) -> None:
    """A copy that went through bytes, as to another process, is the same reward with the same scores."""
    copy = copied(reward)
    assert copy is not reward and type(copy) is type(reward)
    assert copy.config == reward.config
    assert torch.equal(scores(case, copy), scores(case, reward))


def check_gradient(case: Case, reward: RewardModel) -> None:
    """The scorer's gradient to the pixels is that of finite differences; weights get none and rewards have none."""
    assert case.network is not None
    scorer = case.network(reward)
    assert isinstance(scorer, Scorer) and scorer.differentiable
    prompts = [prompt.text for prompt in case.prompts]
    pixels = case.images().clone().requires_grad_()
    scorer.score(pixels, prompts).double().sum().backward()
    assert pixels.grad is not None and pixels.grad.flatten(1).norm(dim=1).gt(0).all()
    assert all(weight.grad is None and not weight.requires_grad for weight in scorer.parameters())
    gradient = pixels.grad.double()
    length = gradient.norm()

    def total(shift: Tensor) -> float:
        with torch.no_grad():
            return scorer.score(pixels + shift.float(), prompts).double().sum().item()

    # Along itself a gradient that is too long or crooked promises too much; one that is lost somewhere shows where it
    # was not followed: the contrast of the left, and of the right half.
    contrast = pixels.detach().double() - 0.5
    left = torch.arange(pixels.shape[-1]) < pixels.shape[-1] // 2
    for direction in (gradient, contrast * left, contrast * ~left):
        step = 0.05 * direction / direction.norm()
        rise = (total(step) - total(-step)) / 2
        promised = (gradient * step).sum().item()
        assert math.isclose(rise, promised, rel_tol=0.02, abs_tol=0.05 * 2e-4 * length.item()), (rise, promised)
    output = reward(**arguments_of(reward, prompts=list(prompts), image=list(pixels)))
    assert isinstance(output.rewards, Tensor) and not output.rewards.requires_grad


def check_broken_image(case: Case, reward: RewardModel) -> None:
    """An image with NaN or an infinite value is a failure of its own; the others score as if it were not there."""
    rows = range(len(case.prompts))
    for row, value in ((0, math.nan), (len(rows) - 1, math.inf)):
        samples = case.samples()
        samples.images[row, 1, 2, 3] = value
        table = ask(case, reward, samples)
        (failure,) = table.failures
        assert (failure.samples, failure.kind) == ((row,), "not finite")
        assert table.scores.isnan()[:, 0].tolist() == [other == row for other in rows]
        others = [other for other in rows if other != row]
        close(table.scores[others, 0], scores(case, reward, others), case.tolerance)


def check_broken_network(case: Case, reward: RewardModel) -> None:
    """A network that answers NaN, as after an overflow, fails for every sample and is never a number."""
    assert case.network is not None
    broken = copied(reward)
    with torch.no_grad():
        for weight in case.network(broken).parameters():
            weight.fill_(math.nan)
    table = ask(case, broken, case.samples())
    assert table.scores.isnan().all()
    assert sorted(row for failure in table.failures for row in failure.samples) == list(range(len(case.prompts)))


def check_empty_batch(case: Case, reward: RewardModel) -> None:
    """Of no samples there are no scores, and nothing fails; a built-in reward may be asked itself."""
    table = ask(case, reward, case.samples([]))
    assert table.scores.shape == (0, 1)
    assert table.failures == ()
    assert table.names == (case.arguments.name,)
    if "." not in case.arguments.reward_model:
        output = reward(**{name: [] for name in reward.required_fields})
        assert len(output.rewards) == 0
        assert all(len(column) == 0 for column in output.extra_info.values())


CHECKS: Mapping[str, Callable[[Case, RewardModel], None]] = {
    "telling_apart": check_telling_apart,
    "batch_invariance": check_batch_invariance,
    "order_invariance": check_order_invariance,
    "pil_equals_tensor": check_pil_equals_tensor,
    "dtype": check_dtype,
    "pickling": check_pickling,
    "gradient": check_gradient,
    "broken_image": check_broken_image,
    "broken_network": check_broken_network,
    "empty_batch": check_empty_batch,
}


# --- tools -----------------------------------------------------------------------------------------------------------


def copied(reward: RewardModel) -> RewardModel:
    """Return the reward after a journey through bytes; the copy shares nothing with it."""
    return pickle.loads(pickle.dumps(reward))


def arguments_of(reward: RewardModel, *, prompts: list[str], image: list[Tensor]) -> dict[str, Any]:
    """Return the reward's required fields, for a reward that reads tensors."""
    given = {"prompt": prompts, "image": image}
    return {name: given[name] for name in reward.required_fields}


def in_the_other_form(reward: RewardModel) -> RewardModel:
    """Return a reward that asks the engine for the form of images that `reward` does not read, and converts them."""
    kind = GroupwiseRewardModel if isinstance(reward, GroupwiseRewardModel) else PointwiseRewardModel

    def call(self: RewardModel, prompt: Any = None, image: Any = None, **rest: Any) -> RewardModelOutput:
        if "condition_images" in rest:
            rest["condition_images"] = [[_converted(part) for part in parts] for parts in rest["condition_images"]]
        fields = {"prompt": prompt, "image": [_converted(item) for item in image], **rest}
        return reward(**{name: fields[name] for name in reward.required_fields})

    form = {"required_fields": reward.required_fields, "use_tensor_inputs": not reward.use_tensor_inputs}
    made: Any = type("Other", (kind,), {**form, "__call__": call})
    return made(reward.config)


def _converted(image: Tensor | Image.Image) -> Tensor | Image.Image:
    """Return a picture as a tensor `[3, H, W]` in [0, 1], or the reverse."""
    if isinstance(image, Tensor):
        levels = np.rint(image.numpy().transpose(1, 2, 0).astype(np.float64) * 255)
        return Image.fromarray(levels.astype(np.uint8))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).astype(np.float32)) / 255
