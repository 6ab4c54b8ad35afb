"""GenEval with its own detector: tiny random weights in the published layouts."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.samples import entry
from tests.shared import SHARED, requires_shared
from tests.tiny_detector import confident, mmdet_state, save_tiny_clip, tiny_mask2former
from tiltflow.data import geneval
from tiltflow.errors import DataError, RewardError
from tiltflow.rewards import RewardEngine, build_reward, check_reward
from tiltflow.rewards.geneval import COLORS, MAX_OBJECTS, THRESHOLD, colored_classes
from tiltflow.rewards.geneval_detector import CLASSES, Mask2FormerDetector
from tiltflow.scorers import geneval_color
from tiltflow.scorers.mask2former import GENEVAL_WEIGHTS, Mask2Former, load_mask2former
from tiltflow.types import Prompt, SampleBatch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with a detector as a folder of transformers and a CLIP."""
    folder = tmp_path_factory.mktemp("models")
    confident(tiny_mask2former()).save_pretrained(folder / "mask2former")
    save_tiny_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def detector(models: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(weights=str(models / "mask2former"), color_model=str(models / "clip"), resize="native")


def pictures(count: int = 2) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(count)]


def test_classes_and_colors_are_genevals() -> None:
    assert CLASSES == geneval.OBJECTS and len(CLASSES) == 80
    assert geneval_color.COLORS == COLORS == geneval.COLORS


@requires_shared
def test_the_order_of_the_classes_is_the_published_one() -> None:
    assert list(CLASSES) == (SHARED / "data/prompts/object_names.txt").read_text().splitlines()


def test_detections_are_the_networks_instances(models: Path, detector: Mask2FormerDetector) -> None:
    network = load_mask2former(str(models / "mask2former"), resize="native")
    images = pictures()
    expected = network.detect([torch.from_numpy(image).permute(2, 0, 1) for image in images], min_score=THRESHOLD)
    found = detector(images)
    assert [len(objects) for objects in found] == [len(instances.scores) for instances in expected]
    assert any(found)
    for objects, instances in zip(found, expected, strict=True):
        assert [CLASSES.index(item.label) for item in objects] == instances.labels.tolist()
        assert [item.score for item in objects] == pytest.approx(instances.scores.tolist(), abs=1e-5)
        boxes = [[item.x1, item.y1, item.x2, item.y2] for item in objects]
        torch.testing.assert_close(torch.tensor(boxes), instances.boxes, atol=1.0, rtol=0)
        assert all(item.score > THRESHOLD and item.color in COLORS for item in objects)


def test_colors_are_named_where_they_matter(models: Path, detector: Mask2FormerDetector) -> None:
    images = pictures()
    everywhere = detector(images)
    label = everywhere[0][0].label
    partly = detector(images, colored=[{label}, set()])
    assert [item.color is not None for item in partly[0]] == [item.label == label for item in everywhere[0]]
    assert partly[0][0].color == everywhere[0][0].color
    assert {item.color for item in partly[1]} == {None}
    # the colour is that of the cut-out object, asked about under its name
    network = load_mask2former(str(models / "mask2former"), resize="native")
    (instances,) = network.detect([torch.from_numpy(images[0]).permute(2, 0, 1)], min_score=THRESHOLD)
    classifier = geneval_color.load_color_classifier(models / "clip")
    crop = classifier.crop(images[0], instances.boxes[0].tolist(), instances.masks[0].numpy())
    assert classifier.colors([crop], [label]) == [everywhere[0][0].color]


def test_at_most_sixteen_objects_of_a_class(models: Path, tmp_path: Path) -> None:
    network = tiny_mask2former()
    with torch.no_grad():  # every query is sure of a cup, and outlines something
        network.class_predictor.weight.zero_()
        network.class_predictor.bias.zero_()[CLASSES.index("cup")] = 20.0
    network.save_pretrained(tmp_path)
    instances = Mask2Former(copy.deepcopy(network), resize="native").detect(
        [torch.from_numpy(pictures(1)[0]).permute(2, 0, 1)], min_score=THRESHOLD
    )[0]
    assert len(instances.scores) > MAX_OBJECTS
    small = Mask2FormerDetector(weights=str(tmp_path), color_model=str(models / "clip"), resize="native")
    (objects,) = small(pictures(1), colored=[()])
    assert [item.score for item in objects] == instances.scores[:MAX_OBJECTS].tolist()


def test_no_images(detector: Mask2FormerDetector) -> None:
    assert detector([]) == []


def test_a_detector_survives_pickling(detector: Mask2FormerDetector) -> None:
    assert pickle.loads(pickle.dumps(detector))(pictures()) == detector(pictures())


def test_which_classes_need_a_color() -> None:
    assert colored_classes(geneval.color_attr("cup", "red", "dog", "blue")) == {"cup", "dog"}
    assert colored_classes(geneval.colors("cup", "red")) == {"cup"}
    assert colored_classes(geneval.counting("cup", 2)) == frozenset()
    with pytest.raises(DataError, match=r"metadata include\[0\] is \{'class': 'cup'\}"):
        colored_classes({"tag": "colors", "include": [{"class": "cup"}]})


# --- the reward -------------------------------------------------------------------------------------------------------


def options(models: Path, **changes: Any) -> dict[str, Any]:
    own = {"weights": str(models / "mask2former"), "color_model": str(models / "clip"), "resize": "native"}
    return own | changes


def test_the_reward_scores_with_its_detector(models: Path, detector: Mask2FormerDetector) -> None:
    images = pictures(3)
    best = [objects[0] for objects in detector(images)]
    wrong = next(color for color in COLORS if color != best[1].color)
    lines = [
        geneval.single_object(best[0].label),
        geneval.colors(best[1].label, wrong),
        geneval.colors(best[2].label, str(best[2].color)),
    ]
    samples = SampleBatch(
        prompts=[Prompt(line["prompt"], {k: v for k, v in line.items() if k != "prompt"}) for line in lines],
        groups=torch.arange(3),
        latents=torch.zeros(3, 1),
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255,
    )
    table = RewardEngine([entry("g", "Geneval", options=options(models, score="correct"))]).score(samples)
    assert table.column("g").tolist() == [1.0, 0.0, 1.0]
    assert f"expected {wrong} {best[1].label}>=1, found 0 {wrong}" in table.extra_info["g"]["reasons"][1][0]


def test_options_reach_the_detector(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spy(Mask2FormerDetector):
        def __init__(self, **given: Any):
            seen.update(given)
            super().__init__(**given)

    seen: dict[str, Any] = {}
    monkeypatch.setattr("tiltflow.rewards.geneval_detector.Mask2FormerDetector", Spy)
    own = options(models, resize="800px", channels="bgr", detector_batch_size=3)
    build_reward("Geneval", device="cpu", dtype="bfloat16", **own)
    assert seen == {
        "weights": own["weights"],
        "color_model": own["color_model"],
        "resize": "800px",
        "channels": "bgr",
        "batch_size": 3,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }


def test_the_switches_change_what_the_network_sees(models: Path) -> None:
    image = Image.fromarray(pictures(1)[0])
    line = geneval.single_object("cup")

    def pixels(**changes: Any) -> torch.Tensor:
        reward: Any = build_reward("Geneval", device="cpu", **options(models, **changes))
        reward(image=[image], metadata=[line])
        return reward._detector._network.prepare(torch.from_numpy(np.array(image)).permute(2, 0, 1))

    plain = pixels()
    assert plain.shape == (3, 64, 96) and pixels(resize="800px").shape == (3, 800, 1216)
    assert not torch.equal(pixels(channels="bgr"), plain)


def test_the_published_file_in_the_models_folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path))
    file = GENEVAL_WEIGHTS[0].name
    with pytest.raises(RewardError, match=f"the weights {file} were not found; get them from download.openmmlab.com"):
        build_reward("Geneval", device="cpu")
    torch.save({"meta": {}, "state_dict": mmdet_state(3)}, tmp_path / file)
    with pytest.raises(RewardError, match="the model openai/clip-vit-large-patch14 was not found; download it"):
        build_reward("Geneval", device="cpu")
    (tmp_path / "clip-vit-large-patch14").symlink_to(models / "clip")
    reward: Any = build_reward("Geneval", device="cpu")
    output = reward(image=[Image.fromarray(pictures(1)[0])], metadata=[geneval.single_object("cup")])
    assert output.rewards == [0.0]


def test_a_network_of_other_classes(models: Path, tmp_path: Path) -> None:
    tiny_mask2former(classes=133).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"tell 133 classes apart; GenEval needs a network trained on COCO's 80"):
        build_reward("Geneval", device="cpu", **options(models, weights=str(tmp_path)))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"resize": "800"}, "reward 'g': resize: Input should be '800px' or 'native'; got '800'"),
        ({"channels": "gbr"}, "reward 'g': channels: Input should be 'rgb' or 'bgr'; got 'gbr'"),
        ({"detector_batch_size": 0}, "reward 'g': detector_batch_size: Input should be greater than or equal to 1"),
        ({"detector": 3, "resize": "native"}, "reward 'g': detector: Input should be a valid string; got 3"),
        ({"weight_file": "x"}, "reward 'g': unknown key 'weight_file'"),
        ({"colour_model": "x"}, "reward 'g': unknown key 'colour_model'; did you mean 'color_model'"),
        (
            {"detector": "shapes", "resize": "native"},
            "reward 'g': resize: Value error, only the detector 'mask2former' has this option, not 'shapes'",
        ),
    ],
)
def test_wrong_detector_options(own: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_reward(entry("g", "Geneval", options=own))
