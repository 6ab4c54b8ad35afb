"""What one reward does to its pictures reaches no other reward, or ends the scoring."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rewards.samples import batch, entry
from tiltflow.errors import RewardError
from tiltflow.rewards import PointwiseRewardModel, RewardEngine, RewardModelOutput, media
from tiltflow.rewards.jpeg import JPEGCompressibilityReward, jpeg_bytes
from tiltflow.rewards.media import Lookers
from tiltflow.types import Prompt


class Shrinks(PointwiseRewardModel):
    """Works on its pictures as Pillow allows, in place."""

    required_fields = ("image", "condition_images")

    def __call__(self, prompt=None, image=None, condition_images=None, **fields: Any):
        widths = [float(picture.width) for picture in image]
        for picture in (*image, *(part for parts in condition_images for part in parts)):
            picture.thumbnail((2, 2))
        return RewardModelOutput(widths)


class ShrinksToo(Shrinks):
    pass


class Bytes(JPEGCompressibilityReward):
    """A user's subclass of a reward of the package."""


def test_pictures_that_a_reward_changes_are_its_own() -> None:
    classes: dict[str, Any] = {"a": Shrinks, "b": ShrinksToo, "c": JPEGCompressibilityReward}
    rewards = [entry(name, name) for name in classes]
    engine = RewardEngine(rewards, factory=lambda arguments: classes[arguments.reward_model](arguments))
    images = torch.rand(2, 3, 16, 16)
    with engine.begin() as scoring:
        scoring.add([Prompt("x")] * 2, [0, 1], images=images, condition_images=[[torch.rand(3, 4, 4)]] * 2)
        table = scoring.finish()
    assert table.column("a").tolist() == table.column("b").tolist() == [16.0, 16.0]
    assert table.extra_info["c"]["bytes"] == [jpeg_bytes(media._pictures(image)) for image in images]


def test_pictures_are_copied_only_for_rewards_that_are_not_the_package_s() -> None:
    samples = media.Media()
    samples.add(
        [Prompt("x")],
        [0],
        images=torch.rand(1, 3, 4, 4),
        videos=None,
        condition_images=None,
        condition_videos=None,
    )
    own, users = JPEGCompressibilityReward(entry()), Bytes(entry())
    shared = samples.fields(own, [0])["image"][0]
    assert samples.fields(own, [0])["image"][0] is shared
    assert samples.fields(users, [0])["image"][0] is not shared
    assert samples.fields(users, [0])["image"][0] == shared


class Writes(PointwiseRewardModel):
    """Does something to its tensors and returns their red levels."""

    required_fields = ("image",)
    use_tensor_inputs = True
    work: Callable[[Any], Any]

    def __call__(self, prompt=None, image=None, **fields: Any):
        for tensor in image:
            type(self).work(tensor)
        return RewardModelOutput([tensor[0, 0, 0].item() for tensor in image])


def writing(work: Callable[[torch.Tensor], Any], **fields: Any) -> RewardEngine:
    """Return an engine with a reward of that behaviour, named "r", before one that only looks."""
    classes = {"x": type("Mine", (Writes,), {"work": staticmethod(work)}), "y": Writes}
    classes["y"] = type("Looks", (Writes,), {"work": staticmethod(len)})
    rewards = [entry("r", "x", **fields), entry("next", "y")]
    return RewardEngine(rewards, factory=lambda arguments: classes[arguments.reward_model](arguments))


def normalise(tensor: torch.Tensor) -> None:
    tensor.mul_(2).sub_(1)


def normalise_and_fail(tensor: torch.Tensor) -> None:
    normalise(tensor)
    raise ValueError("no")


@torch.inference_mode()
def normalise_in_inference_mode(tensor: torch.Tensor) -> None:
    normalise(tensor)


@pytest.mark.parametrize("fields", [{}, {"on_error": "mask"}, {"on_error": "mask", "async_reward": True}])
@pytest.mark.parametrize("work", [normalise, normalise_and_fail, normalise_in_inference_mode])
def test_a_reward_that_writes_to_the_samples_ends_the_scoring(work: Any, fields: dict[str, Any]) -> None:
    # Whichever of two that run at a time finds it first: the one that wrote is named.
    who = "rewards? ('next', )?'r'" if fields.get("async_reward") else "reward 'r'"
    with pytest.raises(RewardError, match=rf"written to while {who} scored them.*; let it clone\(\) a tensor"):
        writing(work, **fields).score(batch([0.5, 0.25]))


def test_who_looks_at_the_samples_at_the_same_time() -> None:
    lookers = Lookers()
    with lookers.join("gone"):
        pass
    with lookers.join("a") as first:
        with lookers.join("b") as second:
            pass
        with lookers.join("c") as third:
            assert third == {"a", "c"}
    assert (first, second) == ({"a", "b", "c"}, {"a", "b"})


def test_a_reward_that_changes_a_clone_is_fine() -> None:
    table = writing(lambda tensor: tensor.clone().mul_(2)).score(batch([0.5, 0.25]))
    assert table.scores.tolist() == [[0.5, 0.5], [0.25, 0.25]]


def test_condition_images_may_be_stacked() -> None:
    class Counts(PointwiseRewardModel):
        required_fields = ("condition_images",)

        def __call__(self, prompt=None, condition_images=None, **fields: Any):
            return RewardModelOutput([float(len(parts)) for parts in condition_images])

    class Shapes(Counts):
        use_tensor_inputs = True

        def __call__(self, prompt=None, condition_images=None, **fields: Any):
            assert [tuple(parts.shape) for parts in condition_images] == [(2, 3, 8, 8)] * 2
            return super().__call__(condition_images=condition_images)

    for cls in (Counts, Shapes):
        with RewardEngine([entry()], factory=cls).begin() as scoring:
            scoring.add([Prompt("a"), Prompt("b")], [0, 1], condition_images=torch.rand(2, 2, 3, 8, 8))
            assert scoring.finish().column("r").tolist() == [2.0, 2.0]
