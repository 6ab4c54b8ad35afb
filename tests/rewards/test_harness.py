"""Every built-in reward and three user-made ones through the harness, over tiny random weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat
from torch import Tensor

from tests.reward_harness import CHECKS, Case
from tests.rewards.fake_judge import completion, said, sent_image, sent_images, serve
from tests.rewards.reward_server import stand, standing_url
from tests.rewards.samples import entry
from tests.rewards.user_made import ContrastRank, NetworkTaste, TinyNetwork, Warmth
from tests.scorers.tiny_clip import save_clip, tiny_model, to_open_clip
from tests.scorers.tiny_image_reward import random_state, write_models
from tests.scorers.tiny_language import save_classifier
from tests.scorers.tiny_vlm import save_vlm
from tests.tiny_detector import save_tiny_clip, tiny_mask2former
from tiltflow.data import geneval
from tiltflow.demo.scenes import SceneObject, draw_scene
from tiltflow.demo.words import draw_word, word_prompt
from tiltflow.rewards import REWARDS, RewardArguments, RewardModel, RewardModelOutput
from tiltflow.rewards.geneval_detector import CLASSES
from tiltflow.scorers import Scorer
from tiltflow.scorers.aesthetic import AestheticHead
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.types import Prompt

GROUPS = (7, 7, 7, 3, 3, 9)

# --- samples ---------------------------------------------------------------------------------------------------------


def of_groups(texts: tuple[str, str, str]) -> list[Prompt]:
    """Return one prompt per sample, one text per group."""
    names = dict(zip(dict.fromkeys(GROUPS), texts, strict=True))
    return [Prompt(names[group]) for group in GROUPS]


def of_lines(*lines: dict[str, Any]) -> list[Prompt]:
    return [Prompt(line["prompt"], {key: line[key] for key in line if key != "prompt"}) for line in lines]


@cache
def noise() -> Tensor:
    """Random pictures of 8 bits, each of another brightness, contrast and colour, `[6, 3, 64, 72]`."""
    generator = np.random.default_rng(0)
    spread, centre = generator.uniform(10, 90, (6, 1, 1, 1)), generator.uniform(60, 190, (6, 3, 1, 1))
    coarse = generator.normal(size=(6, 3, 8, 9)).repeat(8, 2).repeat(8, 3)
    return on_grid(np.clip(centre + spread * (coarse + generator.normal(size=coarse.shape)) / 2, 0, 255))


@cache
def signs() -> Tensor:
    words = ("CAT", "CAR", "UP", "MOON", "MOON", "QUIZ")
    drawn = [draw_word(word, rng=np.random.default_rng(seed)) for seed, word in enumerate(words)]
    return on_grid(np.stack(drawn).transpose(0, 3, 1, 2))


@cache
def scenes() -> Tensor:
    left, right = SceneObject("circle", "red", 16.0, 32.0, 10.0), SceneObject("square", "blue", 46.0, 32.0, 10.0)
    drawn = [draw_scene(objects) for objects in ([left], [left, right], [right], [left], [left, right], [])]
    return on_grid(np.stack(drawn).transpose(0, 3, 1, 2))


def on_grid(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels.astype(np.uint8)).float() / 255


TEXT_PROMPTS = of_groups(("cat", "a red dog", "dog cat dog"))
SIGN_PROMPTS = of_groups((word_prompt("CAT"), word_prompt("MOON"), word_prompt("QUIT")))
CIRCLE, BOTH = geneval.colors("circle", "red"), geneval.position("circle", "right of", "square")
SCENE_PROMPTS = of_lines(BOTH, BOTH, BOTH, CIRCLE, CIRCLE, geneval.counting("square", 2))
# Not of the tag "counting", whose threshold is above what a random network is sure of.
CUPS = {"tag": "single_object", "include": [{"class": "cup", "count": 4}], "prompt": "four cups"}
GREEN_CUPS = {"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "green"}], "prompt": "two green cups"}
CUP_PROMPTS = of_lines(CUPS, CUPS, CUPS, GREEN_CUPS, GREEN_CUPS, {**CUPS, "prompt": "many cups"})

# --- weights ---------------------------------------------------------------------------------------------------------


def write_pickscore(models: Path) -> None:
    save_clip(models / "PickScore_v1", seed=1)


def write_clip(models: Path) -> None:
    save_clip(models / "clip-vit-large-patch14", seed=2, hidden_act="quick_gelu")


def write_hps(models: Path) -> None:
    write_clip(models)  # where the tokenizer is found
    torch.save({"state_dict": to_open_clip(tiny_model(seed=3))}, models / "HPS_v2.1_compressed.pt")


def write_aesthetic(models: Path) -> None:
    write_clip(models)
    torch.manual_seed(5)
    head = AestheticHead(32)
    with torch.no_grad():
        for weight in head.parameters():
            weight.mul_(2.0)  # the initial weights rate all images alike
    torch.save(head.state_dict(), models / "sac+logos+ava1-l14-linearMSE.pth")


def write_image_reward(models: Path) -> None:
    write_models(models, random_state())


def write_deqa(models: Path) -> None:
    save_vlm(models / "tiny-vlm")


def write_language(models: Path) -> None:
    save_classifier(models / "tiny-language")


def write_detector(models: Path) -> None:
    network = tiny_mask2former()
    with torch.no_grad():  # it finds cups, in every picture another number of them
        network.class_predictor.weight.zero_()
        cup = network.class_predictor.weight[CLASSES.index("cup")]
        cup.normal_(std=6.0, generator=torch.Generator().manual_seed(3))
        network.class_predictor.bias.zero_()
    network.save_pretrained(models / "mask2former")
    save_tiny_clip(models / "clip")


# --- judges ----------------------------------------------------------------------------------------------------------


def brightness(image: Image.Image) -> float:
    """Return the mean of all channels, in [0, 1]."""
    return sum(ImageStat.Stat(image).mean) / (3 * 255)


def say_yes(patch: pytest.MonkeyPatch) -> None:
    """Let a judge say yes the more readily, the brighter the image and the longer the question."""

    def answer(body: dict[str, Any]) -> Any:
        asked = len(body["messages"][0]["content"][1]["text"])
        yes = brightness(sent_image(body)) * asked / (asked + 100)
        return completion({"Yes": math.log(yes), " no": math.log(1 - yes)})

    serve(patch, answer)


def rate(patch: pytest.MonkeyPatch) -> None:
    """Let a judge rate the edited image by its brightness, and faithfulness to the source by that of the source."""

    def answer(body: dict[str, Any]) -> Any:
        images = sent_images(body)
        scores = {"Text Faithfulness": images[-1], "Image Faithfulness": images[0]}
        rated = "".join(f"{title}:\nScore: {1 + 3 * brightness(shown)}\n" for title, shown in scores.items())
        return said(f"{rated}Physical and Visual Quality: N/A\nText Rendering: N/A\n")

    serve(patch, answer)


def source_of(group: int) -> list[Tensor]:
    """Return the source image of a group, and another condition image."""
    return [torch.full((3, 8, 8), group * 25 / 255), torch.ones(3, 8, 8)]


# --- cases -----------------------------------------------------------------------------------------------------------


def scorer_of(reward: Any) -> Any:
    return reward.scorer


def judge_of(reward: Any) -> Any:
    return reward._judge


NO_PICTURE = "it reads texts and is shown no picture"
NO_NETWORK = "it has no network"
NO_DTYPE = "it has no network, so that dtype changes nothing"
BYTES = "it reads pictures of 8 bits, through which no gradient comes"
RAPIDOCR = "RapidOCR's networks are ONNX files of the wheel, in float32, whose answers never leave RapidOCR"
AT_THE_THRESHOLD = "a random network is unsure of its objects and in bfloat16 finds others; test_mask2former.py has it"
COUNTING = "its score counts objects: a step, not a slope"


def of_network(name: str, write: Callable[[Path], None], **fields: Any) -> Case:
    """Return the case of a built-in reward that reads noise with a differentiable scorer."""
    given: dict[str, Any] = {"network": scorer_of, "tolerance": 1e-5, **fields}
    return Case(name, entry("r", name), write, given.pop("prompts", TEXT_PROMPTS), noise, GROUPS, **given)


def of_pixels(name: str, reward_model: str, **fields: Any) -> Case:
    """Return the case of a reward that computes on pictures of 8 bits without a network."""
    exempt = {"gradient": BYTES, "dtype": NO_DTYPE, "broken_network": NO_NETWORK}
    given: dict[str, Any] = {"prompts": TEXT_PROMPTS, "images": noise, "exempt": exempt, **fields}
    return Case(name, entry("r", reward_model, options=given.pop("options", {})), None, groups=GROUPS, **given)


def of_judge(name: str, arrange: Callable[[pytest.MonkeyPatch], None], **fields: Any) -> Case:
    """Return the case of a reward that asks a judge, who is asked anew each time."""
    options = {"max_cache_size": 0, "max_retries": 0, **fields.pop("options", {})}
    return of_pixels(name, name, arrange=arrange, options=options, **fields)


def of_server(name: str, model: str) -> Case:
    """Return the case of a reward that a server in a thread computes on pictures of 8 bits."""
    case = of_pixels(name, name, options={"server_url": standing_url(model)})
    return replace(case, write=lambda _: stand(model))


CASES = [
    of_network("PickScore", write_pickscore, bfloat16=0.03),
    of_network("PickScore_Rank", write_pickscore, tolerance=0.0),
    of_network("CLIP", write_clip, bfloat16=0.01),
    of_network("HPSv2", write_hps, bfloat16=0.008),
    of_network("AestheticScore", write_aesthetic, bfloat16=0.02),
    of_network("ImageReward", write_image_reward, prompts=of_groups(("w7 w9", "w8", "w7 w3 w3 w5")), bfloat16=0.05),
    Case(
        "DeQAScore",
        entry("r", "DeQAScore", options={"model": "tiny-vlm"}),
        write_deqa,
        TEXT_PROMPTS,
        noise,
        GROUPS,
        network=judge_of,
        tolerance=1e-5,
        bfloat16=0.25,
        exempt={"gradient": BYTES},
    ),
    Case(
        "LanguageReward",
        entry("r", "LanguageReward", options={"model": "tiny-language"}),
        write_language,
        of_groups(("w1 w2 good", "w5", "bad w3 w3 w9 w9 w1")),
        noise,
        GROUPS,
        network=lambda reward: reward.scorer,
        tolerance=1e-4,
        bfloat16=0.05,
        exempt=dict.fromkeys(("gradient", "pil_equals_tensor", "broken_image"), NO_PICTURE),
    ),
    Case(
        "Geneval",
        entry("r", "Geneval", options={"weights": "mask2former", "color_model": "clip", "resize": "native"}),
        write_detector,
        CUP_PROMPTS,
        noise,
        GROUPS,
        network=lambda reward: reward._detector._network,
        exempt={"gradient": COUNTING, "dtype": AT_THE_THRESHOLD},
    ),
    of_pixels("Geneval_shapes", "Geneval", prompts=SCENE_PROMPTS, images=scenes, options={"detector": "shapes"}),
    of_pixels("JPEGCompressibility", "JPEGCompressibility"),
    of_pixels(
        "OCR",
        "OCR",
        prompts=SIGN_PROMPTS,
        images=signs,
        options={"workers": 1},
        exempt={"gradient": BYTES, "dtype": RAPIDOCR, "broken_network": RAPIDOCR},
    ),
    of_judge("vllm_evaluate", say_yes, options={"question": "Is it {prompt}?"}),
    of_judge("rational_rewards_t2i", rate),
    of_judge("rational_rewards_edit", rate, conditions=source_of),
    of_server("RemotePointwiseRewardModel", "warmth"),
    of_server("RemoteGroupwiseRewardModel", "rank"),
    of_pixels("user_pointwise", "tests.rewards.user_made.Warmth"),
    of_pixels("user_groupwise", "tests.rewards.user_made.ContrastRank"),
    Case(
        "user_tensors",
        entry("r", "tests.rewards.user_made.NetworkTaste"),
        None,
        TEXT_PROMPTS,
        noise,
        GROUPS,
        network=scorer_of,
        tolerance=1e-5,
        bfloat16=0.05,
    ),
]

# --- tests -----------------------------------------------------------------------------------------------------------


def marks(case: Case, check: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skip(reason=case.exempt[check])] if check in case.exempt else []


PAIRS = [
    pytest.param(case, check, marks=marks(case, check), id=f"{case.name}-{check}") for case in CASES for check in CHECKS
]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Return a case whose weights lie in the models folder, and nothing else does."""
    found: Case = request.param
    folder = tmp_path_factory.mktemp(found.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODELS_VARIABLE, str(folder))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "no_cache"))
        if found.write is not None:
            found.write(folder)
        if found.arrange is not None:
            found.arrange(patch)
        yield found


@pytest.fixture(scope="module")
def reward(case: Case) -> RewardModel:
    return case.build()


@pytest.mark.parametrize(("case", "check"), PAIRS, indirect=["case"])
def test_reward(case: Case, reward: RewardModel, check: str) -> None:
    CHECKS[check](case, reward)


WITH_SCORERS = [pytest.param(case, id=case.name) for case in CASES if case.network in (scorer_of, judge_of)]


@pytest.mark.parametrize("case", WITH_SCORERS, indirect=True)
def test_what_is_differentiable_is_not_exempt(case: Case, reward: RewardModel) -> None:
    assert case.network is not None
    scorer = case.network(reward)
    assert isinstance(scorer, Scorer)
    assert scorer.differentiable == ("gradient" not in case.exempt)


def test_no_built_in_reward_is_missing() -> None:
    assert {case.arguments.reward_model for case in CASES} >= set(REWARDS)
    assert sum("." in case.arguments.reward_model for case in CASES) == 3


def test_exemptions_are_of_checks_that_there_are_and_say_why() -> None:
    for each in CASES:
        assert set(each.exempt) <= set(CHECKS)
        assert all(len(why.split()) >= 4 for why in each.exempt.values())


# --- the harness itself: each check finds the fault that it is for ----------------------------------------------------


class BatchCentred(Warmth):
    """Depends on the batch."""

    def __call__(self, prompt, image=None, **media: Any):
        rewards = torch.as_tensor(super().__call__(prompt, image=image).rewards)
        return RewardModelOutput(rewards - rewards.mean())


class FirstIsBest(ContrastRank):
    """Depends on the order within a group."""

    def __call__(self, prompt, image=None, **media: Any):
        return RewardModelOutput([float(-index) for index in range(len(prompt))])


class Forgetful(Warmth):
    """Has a state that does not travel."""

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.factor = 2.0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "factor": 1.0}

    def __call__(self, prompt, image=None, **media: Any):
        return RewardModelOutput(torch.as_tensor(super().__call__(prompt, image=image).rewards) * self.factor)


class FromTheCorner(NetworkTaste):
    """Reads pictures upside down."""

    def __call__(self, prompt, image=None, **media: Any):
        return super().__call__(prompt, image=[item if item.is_contiguous() else item.flip(1) for item in image or []])


class HalfDetached(TinyNetwork):
    """Loses the gradient of the right half of the pixels."""

    def score(self, images, prompts):
        middle = images.shape[-1] // 2
        return super().score(torch.cat([images[..., :middle], images[..., middle:].detach()], dim=-1), prompts)


class LostGradient(NetworkTaste):
    def __init__(self, config: RewardArguments, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.scorer = HalfDetached().to(self.device, self.dtype)


class HidesNaN(NetworkTaste):
    """Makes a zero of what is no number."""

    def __call__(self, prompt, image=None, **media: Any):
        return RewardModelOutput(torch.as_tensor(super().__call__(prompt, image=image).rewards).nan_to_num())


class Whole(NetworkTaste):
    """Ignores the dtype."""

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.scorer = TinyNetwork()


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (BatchCentred, "batch_invariance"),
        (FirstIsBest, "order_invariance"),
        (FromTheCorner, "pil_equals_tensor"),
        (Forgetful, "pickling"),
        (LostGradient, "gradient"),
        (HidesNaN, "broken_network"),
        (Whole, "dtype"),
    ],
)
def test_a_faulty_reward_is_caught(cls: type[RewardModel], check: str) -> None:
    path = f"tests.rewards.test_harness.{cls.__name__}"
    network = scorer_of if issubclass(cls, NetworkTaste) else None
    faulty = Case("faulty", entry("r", path), None, TEXT_PROMPTS, noise, GROUPS, network, tolerance=1e-5, bfloat16=0.05)
    with pytest.raises(AssertionError):
        CHECKS[check](faulty, faulty.build())
