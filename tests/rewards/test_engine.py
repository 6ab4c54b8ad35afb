"""The reward engine: what rewards are given, in which portions, and that a failure is never a zero."""

import math
import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.samples import batch, engine_of, entry
from tiltflow.errors import RewardError
from tiltflow.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardEngine, RewardModelOutput
from tiltflow.types import Prompt, RewardFailure

BRIGHTNESS = "tests.rewards_for_tests.Brightness"


class Recorder(PointwiseRewardModel):
    """Returns the red level of each image and remembers what it was called with."""

    made: ClassVar[list["Recorder"]] = []

    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.calls: list[dict[str, Any]] = []
        self.made.append(self)

    def __call__(self, prompt, image=None, **fields: Any):
        self.calls.append({"prompt": prompt, "image": image, **fields})
        if self.use_tensor_inputs:
            return RewardModelOutput(torch.stack([item[0, 0, 0] for item in image]))
        return RewardModelOutput([np.asarray(item)[0, 0, 0] / 255 for item in image])


class TensorRecorder(Recorder):
    use_tensor_inputs = True


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    Recorder.made.clear()


def output_of(value: Any) -> type[PointwiseRewardModel]:
    """Return a reward that answers every call with `value`, or raises it."""

    class Fixed(PointwiseRewardModel):
        def __call__(self, prompt, image=None, **fields: Any):
            if isinstance(value, Exception):
                raise value
            return value

    return Fixed


# --- what a reward is given -------------------------------------------------------------------------------------------


def test_pil_images_are_rounded_to_bytes() -> None:
    table = engine_of(Recorder).score(batch([0.0, 0.399, 1.0]))
    (call,) = Recorder.made[0].calls
    assert all(isinstance(item, Image.Image) for item in call["image"])
    assert [item.size for item in call["image"]] == [(4, 4)] * 3
    assert [item.mode for item in call["image"]] == ["RGB"] * 3
    assert [item.getpixel((1, 2)) for item in call["image"]] == [(0, 0, 0), (102, 102, 102), (255, 255, 255)]
    assert table.scores.dtype == torch.float32
    assert table.column("r").tolist() == pytest.approx([0.0, 0.4, 1.0], abs=1e-6)


def test_pil_images_keep_rows_columns_and_channels() -> None:
    samples = batch([0.0])
    samples.images[0, 2, 1, 3] = 1.0  # blue, second row, last column
    engine_of(Recorder).score(samples)
    (image,) = Recorder.made[0].calls[0]["image"]
    assert image.getpixel((3, 1)) == (0, 0, 255)
    assert image.getpixel((1, 3)) == (0, 0, 0)


def test_tensor_inputs_are_exact() -> None:
    samples = batch([0.123456, 0.7])
    table = engine_of(TensorRecorder).score(samples)
    (call,) = Recorder.made[0].calls
    assert [tuple(item.shape) for item in call["image"]] == [(3, 4, 4)] * 2
    assert torch.equal(torch.stack(call["image"]), samples.images)
    assert torch.equal(table.column("r"), samples.images[:, 0, 0, 0])


@pytest.mark.parametrize("fields", [("prompt", "image"), ("prompt", "image", "metadata")])
def test_only_the_required_fields_are_passed(fields: tuple[str, ...]) -> None:
    class Some(Recorder):
        required_fields = fields

    engine_of(Some).score(batch([0.1, 0.2], groups=[5, 5]))
    (call,) = Recorder.made[0].calls
    assert set(call) == set(fields)
    assert call["prompt"] == ["prompt 5", "prompt 5"]
    if "metadata" in fields:
        assert call["metadata"] == [{"id": 5}, {"id": 5}]


def test_a_text_reward_gets_no_image() -> None:
    class Text(PointwiseRewardModel):
        required_fields = ("prompt",)

        def __call__(self, prompt, image=None, **fields: Any):
            assert image is None
            return RewardModelOutput([float(len(text)) for text in prompt])

    prompts = [Prompt("a"), Prompt("abc")]
    assert engine_of(Text).score(batch([0, 0], prompts=prompts)).column("r").tolist() == [1.0, 3.0]


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (16, [5])])
def test_pointwise_rewards_are_called_with_at_most_batch_size_samples(size: int, expected: list[int]) -> None:
    table = engine_of(TensorRecorder, batch_size=size).score(batch([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert [len(call["prompt"]) for call in Recorder.made[0].calls] == expected
    assert table.column("r").tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


class GroupRank(GroupwiseRewardModel):
    use_tensor_inputs = True

    def __call__(self, prompt, image=None, **fields: Any):
        assert len(set(prompt)) == 1
        levels = torch.stack([item.mean() for item in image])
        return RewardModelOutput(levels.argsort().argsort() / len(prompt), {"size": [len(prompt)] * len(prompt)})


def test_groupwise_rewards_get_whole_groups_whatever_the_batch_size() -> None:
    table = engine_of(GroupRank, batch_size=2).score(batch([0.3, 0.1, 0.2, 0.5, 0.6], groups=[4, 4, 4, 9, 9]))
    assert table.column("r").tolist() == pytest.approx([2 / 3, 0.0, 1 / 3, 0.0, 0.5])
    assert table.extra_info["r"]["size"] == [3, 3, 3, 2, 2]


def test_interleaved_groups_are_put_together_and_scores_put_back() -> None:
    samples = batch([0.3, 0.6, 0.1, 0.5, 0.2], groups=[9, 4, 9, 4, 9])
    assert engine_of(GroupRank).score(samples).column("r").tolist() == pytest.approx([2 / 3, 0.5, 0.0, 0.0, 1 / 3])


def test_two_groups_of_one_text_stay_apart() -> None:
    samples = batch([0.3, 0.1, 0.4, 0.2], groups=[1, 1, 2, 2], prompts=[Prompt("same")] * 4)
    assert engine_of(GroupRank).score(samples).column("r").tolist() == [0.5, 0.0, 0.5, 0.0]


# --- shared instances -------------------------------------------------------------------------------------------------


def test_equal_configurations_share_one_model_and_one_pass() -> None:
    rewards = [
        entry("a", weight=1.0, batch_size=2),
        entry("b", weight=0.5, batch_size=3, on_error="mask"),
        entry("c", dtype="bfloat16"),
    ]
    engine = RewardEngine(rewards, factory=lambda arguments: TensorRecorder(arguments))
    assert [made.config.name for made in Recorder.made] == ["a", "c"]
    table = engine.score(batch([0.0, 0.5, 1.0, 0.25]))
    assert [len(made.calls) for made in Recorder.made] == [2, 1]
    assert table.names == ("a", "b", "c")
    assert torch.equal(table.column("a"), table.column("b"))
    assert engine.weights.tolist() == [1.0, 0.5, 1.0]


def test_different_options_do_not_share() -> None:
    path = "tiltflow.testing.ConstantReward"
    engine = RewardEngine([entry("a", path, options={"value": 1.0}), entry("b", path, options={"value": 2.0})])
    assert engine.score(batch([0.0, 0.0])).scores.tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_names_must_differ() -> None:
    with pytest.raises(RewardError, match="name 'a' is used twice; every entry needs its own name"):
        RewardEngine([entry("a"), entry("b"), entry("a", dtype="float16")])


def test_extra_info_comes_under_the_reward_s_name_with_gaps_where_it_failed() -> None:
    class Sometimes(TensorRecorder):
        def __call__(self, prompt, image=None, **fields: Any):
            if "prompt 1" in prompt:
                raise ValueError("no")
            return RewardModelOutput([0.5] * len(prompt), {"text": [text.upper() for text in prompt]})

    table = engine_of(Sometimes, batch_size=1, on_error="mask").score(batch([0, 0, 0]))
    assert table.extra_info == {"r": {"text": ["PROMPT 0", None, "PROMPT 2"]}}


def test_a_reward_can_tell_why_single_samples_failed() -> None:
    why: dict[int, Exception] = {0: TimeoutError("too slow"), 2: ValueError("no picture"), 3: ValueError("no picture")}
    output = RewardModelOutput([math.nan, 0.5, 7.0, math.nan, math.inf], failures=why)
    table = engine_of(output_of(output), on_error="mask").score(batch([0] * 5))
    assert [math.isnan(score) for score in table.column("r").tolist()] == [True, False, True, True, True]
    assert table.failures == (
        RewardFailure("r", (0,), "timeout", "too slow"),
        RewardFailure("r", (2, 3), "ValueError", "no picture"),
        RewardFailure("r", (4,), "not finite", "the reward is NaN or infinite"),
    )


# --- forms of a result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([0.5, 1.5]),
        torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True),
        torch.tensor([0.5, 1.5], dtype=torch.bfloat16),
        torch.tensor([[0.5], [1.5]]),
        [0.5, 1.5],
        (np.float32(0.5), np.float64(1.5)),
        np.array([0.5, 1.5]),
        [torch.tensor(0.5), torch.tensor(1.5)],
    ],
)
def test_rewards_may_be_any_sequence_of_numbers(rewards: Any) -> None:
    table = engine_of(output_of(RewardModelOutput(rewards))).score(batch([0, 0]))
    assert table.column("r").tolist() == [0.5, 1.5]
    assert table.scores.dtype == torch.float32
    assert not table.scores.requires_grad
    assert table.failures == ()


def test_integer_and_boolean_rewards_become_floats() -> None:
    assert engine_of(output_of(RewardModelOutput(torch.tensor([1, 3])))).score(batch([0, 0])).column("r").tolist() == [
        1.0,
        3.0,
    ]
    assert engine_of(output_of(RewardModelOutput([True, False]))).score(batch([0, 0])).column("r").tolist() == [1, 0]


def test_extra_info_may_be_none() -> None:
    output: Any = RewardModelOutput([1.0, 2.0], None)  # pyright: ignore[reportArgumentType]
    table = engine_of(output_of(output)).score(batch([0, 0]))
    assert table.column("r").tolist() == [1.0, 2.0]
    assert table.extra_info == {}


# --- failures ---------------------------------------------------------------------------------------------------------

FAILURES = [
    (ValueError("the judge is out"), "ValueError", "the judge is out"),
    (RewardModelOutput([1.0]), "length", "returned 1 rewards for 3 samples"),
    (RewardModelOutput(torch.zeros(3, 3)), "length", "returned 9 rewards for 3 samples"),
    (RewardModelOutput([1.0] * 3, {"tag": ["a"]}), "length", "extra_info['tag'] has 1 values for 3 samples"),
    (torch.zeros(3), "TypeError", "returned Tensor; return RewardModelOutput(rewards=...)"),
    (None, "TypeError", "returned NoneType; return RewardModelOutput(rewards=...)"),
    (RewardModelOutput(["a", "b", "c"]), "ValueError", "could not convert string to float: 'a'"),
    (RewardModelOutput([1.0] * 3, failures={3: ValueError("?")}), "length", "failures names sample 3 of 3"),
]


@pytest.mark.parametrize(("value", "kind", "message"), FAILURES)
def test_a_failure_raises_with_reward_samples_and_cause(value: Any, kind: str, message: str) -> None:
    with pytest.raises(RewardError) as raised:
        engine_of(output_of(value)).score(batch([0, 0, 0]))
    text = str(raised.value)
    assert text.startswith("reward 'r' failed on 3 samples, the first of prompt 'prompt 0': ")
    assert f"{kind}: {message}" in text
    assert text.endswith("set on_error: mask for this reward to leave such samples out instead")


@pytest.mark.parametrize(("value", "kind", "message"), FAILURES)
def test_a_masked_failure_is_nan_and_a_record(value: Any, kind: str, message: str) -> None:
    table = engine_of(output_of(value), on_error="mask").score(batch([0, 0, 0]))
    assert table.scores.isnan().all()
    (failure,) = table.failures
    assert (failure.samples, failure.kind) == ((0, 1, 2), kind)
    place = r" \(at test_engine\.py:\d+\)" if isinstance(value, Exception) else ""
    assert re.fullmatch(re.escape(message) + place, failure.message)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_value_that_is_not_finite_fails_alone(bad: float) -> None:
    reward = output_of(RewardModelOutput([0.5, bad, 1.5]))
    table = engine_of(reward, on_error="mask").score(batch([0, 0, 0]))
    assert table.column("r")[[0, 2]].tolist() == [0.5, 1.5]
    assert math.isnan(table.column("r")[1].item())
    assert table.failures == (RewardFailure("r", (1,), "not finite", "the reward is NaN or infinite"),)
    with pytest.raises(RewardError, match="failed on 1 samples, the first of prompt 'prompt 1': not finite"):
        engine_of(reward).score(batch([0, 0, 0]))


def test_a_failed_batch_leaves_the_others_alone() -> None:
    class SecondBatch(TensorRecorder):
        def __call__(self, prompt, image=None, **fields: Any):
            if "prompt 2" in prompt:
                raise ConnectionError("refused")
            return super().__call__(prompt, image=image)

    table = engine_of(SecondBatch, batch_size=2, on_error="mask").score(batch([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert table.column("r")[[0, 1, 4]].tolist() == pytest.approx([0.1, 0.2, 0.5])
    assert table.column("r")[[2, 3]].isnan().all()
    (failure,) = table.failures
    assert (failure.samples, failure.kind) == ((2, 3), "ConnectionError") and failure.message.startswith("refused (at ")
    with pytest.raises(RewardError, match=r"failed on 2 samples.*ConnectionError: refused"):
        engine_of(SecondBatch, batch_size=2).score(batch([0.1, 0.2, 0.3, 0.4, 0.5]))


def test_one_of_several_failures_is_told_and_the_rest_counted() -> None:
    why: dict[int, Exception] = {0: ValueError("no"), 1: ValueError("neither"), 2: ValueError("nor")}
    with pytest.raises(RewardError, match=r"ValueError: no \(2 more failures\)"):
        engine_of(output_of(RewardModelOutput([0.0] * 3, failures=why))).score(batch([0, 0, 0]))


def test_after_a_failure_that_ends_the_scoring_nothing_more_is_asked() -> None:
    class Broken(Recorder):
        def __call__(self, prompt, image=None, **fields: Any):
            super().__call__(prompt, image=image)
            raise ValueError("no")

    with pytest.raises(RewardError, match="ValueError: no"):
        engine_of(Broken, batch_size=1).score(batch([0, 0, 0]))
    assert len(Recorder.made[0].calls) == 1


def test_entries_that_share_a_model_give_it_their_largest_batch_size() -> None:
    rewards = [entry("a", "x", batch_size=2, timeout=1.0), entry("b", "x", batch_size=5, async_reward=True)]
    RewardEngine(rewards, factory=Recorder).score(batch([0.1] * 7))
    (model,) = Recorder.made
    assert [len(call["prompt"]) for call in model.calls] == [5, 2]
    assert (model.config.batch_size, model.config.timeout, model.config.async_reward) == (5, None, True)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 3),
        [torch.zeros(3, 4, 4), torch.zeros(4, 4)],
    ],
)
def test_what_is_no_image_is_refused(images: Any) -> None:
    with (
        engine_of(Recorder).begin() as scoring,
        pytest.raises(ValueError, match=r"images: got .*; give floating-point tensors \[3, H, W\] in \[0, 1\]"),
    ):
        scoring.add([Prompt("a"), Prompt("b")], [0, 1], images=images)


def test_the_pictures_are_let_go_of_when_scoring_ends() -> None:
    samples = batch([0.1, 0.2])
    engine = engine_of(Recorder)
    with engine.begin() as scoring:
        scoring.add_batch(samples)
        scoring.finish()
    assert scoring._media.images == []


def test_extra_info_becomes_plain_values() -> None:
    info = {"a": torch.tensor([[0.5, 1.0], [2.0, 3.0]]), "b": [np.float32(0.25), torch.tensor(3)], "c": ["x", None]}
    table = engine_of(output_of(RewardModelOutput([1.0, 2.0], info))).score(batch([0, 0]))
    assert table.extra_info == {"r": {"a": [[0.5, 1.0], [2.0, 3.0]], "b": [0.25, 3], "c": ["x", None]}}
    assert [type(cell) for cell in table.extra_info["r"]["b"]] == [float, int]


def test_a_shared_model_fails_under_each_entry_s_own_name_and_policy() -> None:
    path = "tests.rewards_for_tests.NaNForFirst"
    rewards = [entry("a", path, on_error="mask"), entry("b", path, on_error="mask"), entry("c", BRIGHTNESS)]
    table = RewardEngine(rewards).score(batch([0.5, 0.5]))
    assert [(failure.reward, failure.samples) for failure in table.failures] == [("a", (0,)), ("b", (0,))]
    assert table.scores.isnan().tolist() == [[True, True, False], [False, False, False]]
    with pytest.raises(RewardError, match="reward 'b' failed on 1 samples"):
        RewardEngine([entry("a", path, on_error="mask"), entry("b", path)]).score(batch([0.5, 0.5]))


@pytest.mark.parametrize("name", ["NaNForFirst", "AllNaN", "OneShort", "Broken"])
def test_no_failure_is_ever_a_zero(name: str) -> None:
    engine = RewardEngine([entry("r", f"tests.rewards_for_tests.{name}", on_error="mask")])
    table = engine.score(batch([0.5, 0.5, 0.5]))
    failed = [row for failure in table.failures for row in failure.samples]
    assert failed
    assert table.column("r")[failed].isnan().all()
    assert not (table.column("r") == 0).any()


def test_interruption_is_not_swallowed() -> None:
    class Interrupted(TensorRecorder):
        def __call__(self, prompt, image=None, **fields: Any):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_of(Interrupted, on_error="mask").score(batch([0]))
