"""Finding, checking and building rewards: built-in names, Python paths, options, and what their errors say."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.rewards.samples import batch, entry
from tiltflow.errors import RewardError
from tiltflow.rewards import (
    REWARDS,
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardEngine,
    RewardModelOutput,
    build_reward,
    build_reward_model,
    check_prompts,
    check_reward,
    reward_class,
)
from tiltflow.rewards.base import PROVIDED_FIELDS
from tiltflow.rewards.geneval_reward import GenevalReward
from tiltflow.types import Config, Prompt

HERE = "tests.rewards.test_registry"


# --- the custom rewards of the guide, as users write them -------------------------------------------------------------


class MyPointwiseReward(PointwiseRewardModel):
    """Custom pointwise reward model."""

    required_fields = ("prompt", "image")

    def __init__(self, config: RewardArguments, accelerator: Any):
        super().__init__(config, accelerator)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: list[Image.Image] | None = None,
        video: list[list[Image.Image]] | None = None,
        condition_images: list[list[Image.Image]] | None = None,
        condition_videos: list[list[list[Image.Image]]] | None = None,
    ) -> RewardModelOutput:
        assert image is not None
        assert all(isinstance(item, Image.Image) for item in image)
        rewards = torch.zeros(len(prompt), device=self.device)
        return RewardModelOutput(rewards=rewards)


class MyGroupwiseReward(GroupwiseRewardModel):
    """Custom groupwise reward model with ranking."""

    required_fields = ("prompt", "image")

    def __init__(self, config: RewardArguments, accelerator: Any):
        super().__init__(config, accelerator)
        self.batches: list[int] = []

    def _score_batch(self, prompt: list[str], image: list[Image.Image]) -> torch.Tensor:
        self.batches.append(len(prompt))
        return torch.tensor([float(item.getpixel((0, 0))[0]) for item in image])

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: list[Image.Image] | None = None,
        video: list[list[Image.Image]] | None = None,
        condition_images: list[list[Image.Image]] | None = None,
        condition_videos: list[list[list[Image.Image]]] | None = None,
    ) -> RewardModelOutput:
        group_size = len(prompt)
        all_scores = []
        for i in range(0, group_size, self.config.batch_size):
            batch_scores = self._score_batch(
                prompt[i : i + self.config.batch_size],
                image[i : i + self.config.batch_size],
            )
            all_scores.append(batch_scores)
        raw_scores = torch.cat(all_scores, dim=0)
        ranks = raw_scores.argsort().argsort()
        rewards = ranks.float() / group_size
        return RewardModelOutput(rewards=rewards)


class TensorBasedReward(PointwiseRewardModel):
    """Reward model that operates directly on tensors."""

    required_fields = ("prompt", "image")
    use_tensor_inputs = True

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: list[torch.Tensor] | None = None,
        video: list[torch.Tensor] | None = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        # The guide prints zeros_like(prompt), which no list has; this is what it means.
        stacked = torch.stack(image or [])
        assert stacked.shape == (len(prompt), 3, 4, 4)
        rewards = torch.zeros(len(prompt), dtype=torch.float32)
        return RewardModelOutput(rewards=rewards)


def test_the_guide_s_pointwise_reward() -> None:
    table = RewardEngine([entry("custom", f"{HERE}.MyPointwiseReward", batch_size=2)]).score(batch([0.1, 0.2, 0.3]))
    assert table.column("custom").tolist() == [0.0, 0.0, 0.0]
    assert table.failures == ()


def test_the_guide_s_groupwise_reward() -> None:
    reward = MyGroupwiseReward(entry("custom", f"{HERE}.MyGroupwiseReward", batch_size=2), None)
    engine = RewardEngine([entry("custom")], factory=lambda arguments: reward)
    table = engine.score(batch([0.3, 0.1, 0.2, 0.5, 0.6, 0.4], groups=[0, 0, 0, 1, 1, 1]))
    assert table.column("custom").tolist() == pytest.approx([2 / 3, 0, 1 / 3, 1 / 3, 2 / 3, 0])
    assert reward.batches == [2, 1, 2, 1]


def test_the_guide_s_tensor_reward() -> None:
    table = RewardEngine([entry("custom", f"{HERE}.TensorBasedReward")]).score(batch([0.1, 0.2, 0.3]))
    assert table.column("custom").tolist() == [0.0, 0.0, 0.0]


def test_a_reward_knows_its_config_device_and_dtype() -> None:
    reward = build_reward(f"{HERE}.MyPointwiseReward", device="cpu", dtype="bfloat16", batch_size=3)
    assert isinstance(reward, MyPointwiseReward)
    assert reward.device == torch.device("cpu")
    assert reward.dtype == torch.bfloat16
    assert reward.accelerator is None
    assert (reward.config.name, reward.config.batch_size) == ("MyPointwiseReward", 3)
    assert reward(["a", "b"], image=[Image.new("RGB", (4, 4))] * 2).rewards.tolist() == [0.0, 0.0]


# --- built-in names ---------------------------------------------------------------------------------------------------


def test_built_in_geneval() -> None:
    builtins = (
        "AestheticScore CLIP DeQAScore Geneval HPSv2 ImageReward JPEGCompressibility LanguageReward OCR PickScore "
        "PickScore_Rank RemoteGroupwiseRewardModel RemotePointwiseRewardModel "
        "rational_rewards_edit rational_rewards_t2i vllm_evaluate"
    )
    assert sorted(REWARDS) == builtins.split()
    assert reward_class("Geneval") is GenevalReward
    assert isinstance(build_reward("Geneval", device="cpu", detector="shapes"), GenevalReward)


@pytest.mark.parametrize("name", ["geneval", "GenEval", "Genevall"])
def test_an_unknown_built_in_suggests_the_nearest(name: str) -> None:
    with pytest.raises(RewardError, match=f"reward_model='{name}' is not a built-in reward; did you mean 'Geneval'?"):
        build_reward(name)


def test_an_unknown_name_lists_the_built_ins_and_the_python_path() -> None:
    with pytest.raises(RewardError, match=r"'Foo' is not a built-in reward; built-ins: .*Geneval.*; or give a full"):
        build_reward("Foo")


# --- Python paths -----------------------------------------------------------------------------------------------------

PATH_ERRORS = [
    ("no_such_package.rewards.Mine", "no_such_package.rewards cannot be imported: ModuleNotFoundError: No module"),
    ("tests.rewards_for_tests.Nothing", "tests.rewards_for_tests has no 'Nothing'"),
    ("tests.rewards_for_tests.Brightnes", "has no 'Brightnes'; did you mean 'Brightness'?"),
    ("tests.rewards_for_tests.math", "math in tests.rewards_for_tests is not a subclass of PointwiseRewardModel or"),
    ("tests.rewards_for_tests.Path", "Path in tests.rewards_for_tests is not a subclass of PointwiseRewardModel or"),
    ("tiltflow.rewards.RewardModel", "RewardModel in tiltflow.rewards is not a subclass of PointwiseRewardModel or"),
    (".Mine", "cannot be imported: ValueError: Empty module name"),
]


@pytest.mark.parametrize(("path", "message"), PATH_ERRORS)
def test_a_wrong_python_path_says_what_is_wrong(path: str, message: str) -> None:
    with pytest.raises(RewardError) as raised:
        build_reward(path)
    assert str(raised.value).startswith(f"reward_model={path!r}: ")
    assert message in str(raised.value)


def test_a_module_that_cannot_be_found_says_where_it_must_be() -> None:
    with pytest.raises(
        RewardError, match=r"named 'no_such_package'; the folder that .* called in, installed, or on PYTHONPATH$"
    ):
        build_reward("no_such_package.Mine")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("class A(:\n", "SyntaxError: "),
        ("\n1 / 0\n", r"ZeroDivisionError: division by zero \(at my_broken_rewards.py:2\);"),
    ],
)
def test_a_module_that_fails_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    (tmp_path / "my_broken_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(RewardError, match=f"my_broken_rewards cannot be imported: {cause}"):
        build_reward("my_broken_rewards.A")


def test_an_abstract_reward_cannot_be_built() -> None:
    with pytest.raises(RewardError, match="cannot be built: TypeError: Can't instantiate abstract class"):
        build_reward("tiltflow.rewards.PointwiseRewardModel")


class FailsToLoad(MyPointwiseReward):
    def __init__(self, config: RewardArguments, accelerator: Any = None):
        raise OSError("no space left for the weights")


def test_a_constructor_that_fails_names_the_reward_and_the_cause() -> None:
    message = r"reward 'mine' cannot be built: OSError: no space left for the weights \(at test_registry.py:\d+\)$"
    with pytest.raises(RewardError, match=message):
        build_reward_model(entry("mine", f"{HERE}.FailsToLoad"))


@pytest.mark.parametrize(
    ("name", "found"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_the_gpu_of_the_process_is_meant_where_none_is_named(name: str, found: str) -> None:
    accelerator = SimpleNamespace(device=torch.device("cuda:1"))
    reward = build_reward_model(entry("mine", f"{HERE}.MyPointwiseReward", device=name), accelerator)
    assert reward.device == torch.device(found)


def test_the_accelerator_reaches_the_reward() -> None:
    accelerator = SimpleNamespace(device=torch.device("meta"))
    reward = build_reward_model(entry("mine", f"{HERE}.MyPointwiseReward", device="auto"), accelerator)
    assert reward.accelerator is accelerator
    assert reward.device == torch.device("meta")


# --- options and arguments --------------------------------------------------------------------------------------------


class TunableOptions(Config):
    threshold: float = 0.5
    style: str


class Tunable(MyPointwiseReward):
    Options = TunableOptions


def test_options_reach_the_reward_checked_and_with_defaults() -> None:
    reward = build_reward(f"{HERE}.Tunable", device="cpu", style="plain", threshold="1e-3")
    assert reward.options == TunableOptions(style="plain", threshold=0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"style": "x", "treshold": 1},
            "unknown key 'treshold'; did you mean 'threshold'?; its own options: style, ",
        ),
        ({"style": "x", "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'?"),
        ({"style": "x", "colour": 1}, "unknown key 'colour'; its own options: style, threshold"),
        ({"style": "x", "threshold": "high"}, "threshold: Input should be a valid number.*; got 'high'"),
        ({"style": "x", "threshold": float("nan")}, "threshold: Input should be a finite number; got nan"),
        ({}, "style: Field required"),
    ],
)
def test_wrong_options_name_the_reward_and_the_nearest_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=f"^reward 'mine': {message}".replace("?;", r"\?;")):
        check_reward(entry("mine", f"{HERE}.Tunable", options=options))


def test_a_reward_without_options_says_so() -> None:
    with pytest.raises(RewardError, match="reward 'mine': unknown key 'server_url'; its own options: none"):
        check_reward(entry("mine", f"{HERE}.MyPointwiseReward", options={"server_url": "http://localhost"}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: Input should be greater than or equal to 1"),
        ({"dtype": "fp16"}, "dtype='fp16': Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"device": "banana"}, "cannot be built: RuntimeError: Expected one of cpu, cuda"),
    ],
)
def test_wrong_arguments_of_build_reward(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=f"reward 'MyPointwiseReward'.*{message}"):
        build_reward(f"{HERE}.MyPointwiseReward", **arguments)


# --- fields that samples do not have ----------------------------------------------------------------------------------


class NeedsVideo(FailsToLoad):
    required_fields = ("prompt", "video")


class NeedsConditions(FailsToLoad):
    required_fields = ("image", "condition_images", "condition_videos")


class NeedsDepth(FailsToLoad):
    required_fields = ("prompt", "depth")


class NeedsMetadata(FailsToLoad):
    required_fields = ("prompt", "metadata")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "NeedsVideo",
            "reward 'mine' requires 'video', which these samples do not have; they have: prompt, image, metadata",
        ),
        ("NeedsConditions", "reward 'mine' requires 'condition_images', which these samples do not have"),
        ("NeedsDepth", "reward 'mine': required_fields names 'depth'; legal fields: prompt, image, video"),
    ],
)
def test_a_field_that_no_sample_has_is_refused_before_the_model_loads(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_reward(entry("mine", f"{HERE}.{name}"), provided=PROVIDED_FIELDS)


def test_a_field_that_no_reward_can_have_is_refused_wherever_it_is_built() -> None:
    arguments = entry("mine", f"{HERE}.NeedsDepth")
    for check in (check_reward, build_reward_model, lambda arguments: RewardEngine([arguments])):
        with pytest.raises(RewardError, match="reward 'mine': required_fields names 'depth'"):
            check(arguments)


class CountsFrames(PointwiseRewardModel):
    required_fields = ("video",)

    def __call__(self, prompt=None, image=None, video=None, condition_images=None, condition_videos=None):
        return RewardModelOutput([float(len(frames)) for frames in video])


def test_a_reward_of_videos_can_be_built_and_fed() -> None:
    with RewardEngine([entry("mine", f"{HERE}.CountsFrames")]).begin() as scoring:
        scoring.add([Prompt("a")], [0], videos=torch.rand(1, 2, 3, 4, 4))
        assert scoring.finish().column("mine").tolist() == [2.0]


def test_a_timeout_that_nothing_can_keep_is_refused() -> None:
    with pytest.raises(RewardError, match=r"reward 'mine': timeout=5 needs async_reward: true"):
        check_reward(entry("mine", f"{HERE}.MyPointwiseReward", timeout=5.0))
    check_reward(entry("mine", f"{HERE}.MyPointwiseReward", timeout=5.0, async_reward=True))


def test_metadata_that_some_prompts_lack_is_refused_before_the_model_loads() -> None:
    prompts = [Prompt("a cat", {"tag": "colors"}), Prompt("a dog"), Prompt("a cow")]
    rewards = [entry("plain", f"{HERE}.MyPointwiseReward"), entry("mine", f"{HERE}.NeedsMetadata")]
    with pytest.raises(
        RewardError,
        match=r"reward 'mine' requires 'metadata', but 2 of 3 prompts of 'my\.txt' have none, the first being 'a dog'; "
        r"use a \.jsonl file",
    ):
        check_prompts(rewards, prompts, source="my.txt")


def test_metadata_that_all_prompts_have_or_no_reward_requires_is_fine() -> None:
    check_prompts([entry("mine", f"{HERE}.NeedsMetadata")], [Prompt("a cat", {"tag": "colors"})], source="a")
    check_prompts([entry("mine", f"{HERE}.MyPointwiseReward")], [Prompt("a cat")], source="a")
