"""The GenEval reward on drawn scenes: pictures in, scores and their explanation out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rewards.samples import entry
from tiltflow.data import geneval, load_prompts
from tiltflow.demo.scenes import SceneObject, draw_scene
from tiltflow.errors import RewardError
from tiltflow.rewards import RewardEngine, build_reward, check_prompts, check_reward
from tiltflow.rewards.geneval import Detection
from tiltflow.rewards.geneval_reward import detector_class
from tiltflow.types import Prompt, RewardTable, SampleBatch

LEFT = SceneObject("circle", "red", x=16.0, y=32.0, radius=10.0)
RIGHT = SceneObject("square", "blue", x=46.0, y=32.0, radius=10.0)


def score(scenes: list[list[SceneObject]], lines: list[dict[str, Any]], **options: Any) -> RewardTable:
    images = torch.from_numpy(np.stack([draw_scene(scene) for scene in scenes])).permute(0, 3, 1, 2) / 255
    count = len(scenes)
    samples = SampleBatch(
        prompts=[Prompt(line["prompt"], {k: v for k, v in line.items() if k != "prompt"}) for line in lines],
        groups=torch.arange(count),
        latents=torch.zeros(count, 1),
        images=images,
    )
    engine = RewardEngine([entry("geneval", "Geneval", batch_size=2, options={"detector": "shapes", **options})])
    return engine.score(samples)


def test_a_scene_that_shows_its_prompt_scores_one() -> None:
    lines = [
        geneval.two_object("circle", "square"),
        geneval.position("circle", "left of", "square"),
        geneval.color_attr("circle", "red", "square", "blue"),
    ]
    table = score([[LEFT, RIGHT]] * 3, lines)
    assert table.column("geneval").tolist() == [1.0, 1.0, 1.0]
    info = table.extra_info["geneval"]
    assert info["tag"] == ["two_object", "position", "color_attr"]
    assert info["correct"] == info["strict"] == [True, True, True]
    assert info["partial"] == [1.0, 1.0, 1.0]
    assert info["reasons"] == [[], [], []]


def test_what_is_wrong_lowers_the_partial_score_and_is_explained() -> None:
    lines = [
        geneval.position("circle", "right of", "square"),
        geneval.color_attr("circle", "green", "square", "blue"),
        geneval.counting("circle", 2),
    ]
    table = score([[LEFT, RIGHT], [LEFT, RIGHT], [LEFT]], lines)
    assert table.column("geneval").tolist() == pytest.approx([2 / 3, 3 / 4, 1 / 2])
    info = table.extra_info["geneval"]
    assert info["strict"] == [False, False, False]
    assert info["reasons"] == [
        ["expected circle right of target, found left of target"],
        ["expected green circle>=1, found 0 green; and 1 red"],
        ["expected circle>=2, found 1"],
    ]


def test_which_score_is_the_reward_is_an_option() -> None:
    line = geneval.position("circle", "right of", "square")
    extra = SceneObject("star", "pink", x=32.0, y=10.0, radius=7.0)
    two_circles = [SceneObject("circle", "red", x=31.0, y=56.0, radius=6.0), LEFT, RIGHT]
    assert score([[LEFT, RIGHT]], [line], score="strict").column("geneval").tolist() == [0.0]
    assert score([[LEFT, RIGHT]], [line], quirks="reference").column("geneval").tolist() == [0.75]
    asked = geneval.single_object("circle")
    assert score([[LEFT, extra]], [asked], score="strict").column("geneval").tolist() == [1.0]
    assert score([two_circles], [asked], score="correct").column("geneval").tolist() == [1.0]
    assert score([two_circles], [asked], score="strict").column("geneval").tolist() == [0.0]


def test_an_empty_picture() -> None:
    table = score([[]], [geneval.single_object("circle")])
    assert table.column("geneval").tolist() == [0.0]
    assert table.extra_info["geneval"]["reasons"] == [["expected circle>=1, found 0"]]


def test_malformed_metadata_is_a_failure_that_names_the_prompt() -> None:
    line = {"tag": "colours", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}
    with pytest.raises(RewardError, match=r"first of prompt 'a circle': DataError: tag is 'colours'; it must be one"):
        score([[LEFT]], [line])


class OneCup:
    """A detector by Python path: sees a cup everywhere."""

    def __call__(self, images: Any) -> list[list[Detection]]:
        assert all(image.dtype == np.uint8 and image.shape == (64, 64, 3) for image in images)
        return [[Detection("cup", 1, 1, 5, 5, 0.95)] for _ in images]


def test_a_detector_by_python_path() -> None:
    path = "tests.rewards.test_geneval_reward.OneCup"
    assert score([[]], [geneval.single_object("cup")], detector=path).column("geneval").tolist() == [1.0]


CUP = "tests.rewards.test_geneval_reward.OneCup"  # does not tell what it can find


@pytest.mark.parametrize(
    ("detector", "line", "message"),
    [
        ("mask2former", geneval.single_object("mug"), "cannot find the class 'mug'.* it knows person, bicycle, car"),
        ("mask2former", geneval.single_object("circle"), "cannot find the class 'circle'"),
        ("mask2former", geneval.colors("cup", "gray"), "color is one of red"),
        ("mask2former", geneval.colors("cup", "brown"), None),
        ("shapes", geneval.colors("circle", "brown"), "cannot find the color 'brown'.* it knows red, .*, pink, black;"),
        ("shapes", geneval.two_object("circle", "cup"), "cannot find the class 'cup'.* it knows circle, square, "),
        ("shapes", geneval.two_object("circle", "ring"), None),
        (CUP, geneval.single_object("mug"), None),
        (CUP, geneval.colors("mug", "gray"), "color is one of red"),
        ("shape", geneval.single_object("ring"), "did you mean 'shapes'"),
    ],
)
def test_what_a_detector_can_never_find_is_refused_before_it_is_built(
    detector: str, line: dict[str, Any], message: str | None
) -> None:
    rewards = [entry("g", "Geneval", options={"detector": detector})]
    prompts = [Prompt(line["prompt"], line)]
    if message is None:
        check_prompts(rewards, prompts, source="mine.jsonl")
        return
    with pytest.raises(RewardError, match=message):
        check_prompts(rewards, prompts, source="mine.jsonl")


def test_the_published_prompts_can_be_found() -> None:
    for name, detector in (("geneval", "mask2former"), ("shapes", "shapes")):
        rewards = [entry("g", "Geneval", options={"detector": detector})]
        check_prompts(rewards, load_prompts(name, split="test"), source=name)
        check_prompts(rewards, load_prompts(name, split="train")[:2000], source=name)


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (
            "shape",
            "detector='shape' is neither built in .mask2former, shapes. nor a Python path; did you mean 'shapes'?",
        ),
        (
            "no_such.Detector",
            "detector='no_such.Detector' cannot be imported: ModuleNotFoundError: No module",
        ),
        (
            "tests.rewards.test_geneval_reward.Nothing",
            "cannot be imported: tests.rewards.test_geneval_reward has no '",
        ),
    ],
)
def test_unknown_detectors(detector: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        build_reward("Geneval", device="cpu", detector=detector)


def test_a_detector_that_ends_the_process_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quitting_detector.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = "detector='quitting_detector.Mine' cannot be imported: RuntimeError: SystemExit: 0"
    with pytest.raises(RewardError, match=message):
        detector_class("quitting_detector.Mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detecter": "shapes"}, "reward 'g': unknown key 'detecter'; did you mean 'detector'"),
        ({"score": "exact"}, "reward 'g': score: Input should be 'partial', 'strict' or 'correct'; got 'exact'"),
        ({"quirks": "none"}, "reward 'g': quirks: Input should be 'clean' or 'reference'; got 'none'"),
    ],
)
def test_wrong_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_reward(entry("g", "Geneval", options=options))


def test_called_directly() -> None:
    from PIL import Image

    reward = build_reward("Geneval", device="cpu", detector="shapes")
    image = Image.fromarray(draw_scene([LEFT])).convert("RGBA")
    output = reward(prompt=[""], image=[image], metadata=[geneval.colors("circle", "red")])  # pyright: ignore
    assert output.rewards == [1.0]
