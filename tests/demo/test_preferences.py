"""Preferences between drawn scenes: the right image is right, the other one is not, and labels say so as configured."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.data.drawn_pairs import DrawnPairs, draw_pairs
from tiltflow.data.geneval import content
from tiltflow.data.image_preferences import ImagePreferences, PairFilter, read_image_preferences
from tiltflow.demo.detector import ShapeDetector
from tiltflow.demo.preferences import FLAWS, DrawnPreferences, degrade, draw_pair, spoil
from tiltflow.demo.prompts import split_prompts
from tiltflow.rewards.geneval import score_detections


def is_right(image: np.ndarray, line: dict) -> bool:
    (found,) = ShapeDetector()([image])
    return score_detections(found, line).strict


def write_pairs(pairs: DrawnPreferences, path: Path) -> None:
    """Write pairs as Parquet in Pick-a-Pic's columns, images as PNG, so that no pixel changes."""
    rows = []
    for place, (label_0, label_1) in enumerate(pairs.labels.tolist()):
        row = {"label_0": label_0, "label_1": label_1, "has_label": True, "caption": pairs.prompts[place]}
        for key, image in zip(("jpg_0", "jpg_1"), pairs.images(place), strict=True):
            file = io.BytesIO()
            Image.fromarray(image.numpy()).save(file, format="PNG")
            row[key] = file.getvalue()
        rows.append(row)
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, the extra 'parquet', is not installed")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


def test_the_right_image_is_right_and_the_other_is_not() -> None:
    pairs = DrawnPreferences(DrawnPairs(pairs=400, degraded=0.0, ties=0.0))
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for place, kind in enumerate(pairs.kinds):
        images = [image.numpy() for image in pairs.images(place)]
        better = pairs.better[place]
        right[kind] += is_right(images[better], pairs.lines[place])
        wrong[kind] += is_right(images[1 - better], pairs.lines[place])
    kinds = Counter(pairs.kinds)
    assert set(kinds) == {"shape", "color", "count", "position"}
    assert sum(right.values()) >= 0.98 * 400  # the detector itself is right in 99%
    # Another shape, count or place of an object is always wrong; so is another colour that was asked for.
    assert sum(wrong.values()) <= 0.02 * 400, wrong


def test_ties_are_two_right_images() -> None:
    pairs = DrawnPreferences(DrawnPairs(pairs=40, ties=1.0))
    assert pairs.labels.tolist() == [[0.5, 0.5]] * 40
    images = [image.numpy() for place in range(40) for image in pairs.images(place)]
    assert sum(is_right(image, pairs.lines[place // 2]) for place, image in enumerate(images)) >= 77
    assert not any(np.array_equal(images[place], images[place + 1]) for place in range(0, 80, 2))


def test_degraded_images_differ_and_clean_ones_do_not_change() -> None:
    line = next(line for line in split_prompts("train") if line["tag"] == "colors")
    clean, bad = draw_pair(line, "degraded", seed=(0, 0))
    assert clean.shape == bad.shape == (64, 64, 3)
    assert clean.dtype == bad.dtype == np.uint8
    rng = np.random.default_rng(0)
    differences = [np.abs(degrade(clean, rng).astype(int) - clean).mean() for _ in range(30)]
    assert min(differences) > 0.2
    assert np.array_equal(clean, draw_pair(line, "tie", seed=(0, 0))[0])


def test_pairs_depend_on_the_seed_alone() -> None:
    first, second = (DrawnPreferences(DrawnPairs(pairs=30, seed=3, label_noise=0.2)) for _ in range(2))
    other = DrawnPreferences(DrawnPairs(pairs=30, seed=4, label_noise=0.2))
    assert first.prompts == second.prompts != other.prompts
    assert np.array_equal(first.labels, second.labels)
    for place in (29, 0, 7):
        for a, b in zip(first.images(place), second.images(place), strict=True):
            assert torch.equal(a, b)


def test_shares_are_as_configured() -> None:
    pairs = DrawnPreferences(DrawnPairs(pairs=6000, ties=0.2, degraded=0.5, label_noise=0.1))
    kinds = Counter(pairs.kinds)
    assert kinds["tie"] / 6000 == pytest.approx(0.2, abs=0.02)
    assert kinds["degraded"] / 6000 == pytest.approx(0.4, abs=0.02)
    decided = pairs.labels[:, 0] != 0.5
    assert decided.sum() == 6000 - kinds["tie"]
    labelled = pairs.labels.argmax(axis=1)[decided]
    assert (labelled != np.array(pairs.better)[decided]).mean() == pytest.approx(0.1, abs=0.015)
    assert pairs.labels[decided, 0].mean() == pytest.approx(0.5, abs=0.03)  # which side is better tells nothing


def test_held_out_pairs_show_what_no_training_pair_shows() -> None:
    train, test = (DrawnPreferences(DrawnPairs(pairs=500, prompts=split)) for split in ("train", "test"))
    assert not {content(line) for line in train.lines} & {content(line) for line in test.lines}


@pytest.mark.parametrize(("tag", "kind"), sorted({(tag, kind) for tag, kinds in FLAWS.items() for kind in kinds}))
def test_a_spoilt_scene_differs_in_one_respect(tag: str, kind) -> None:
    rng = np.random.default_rng(0)
    for line in [line for line in split_prompts("train") if line["tag"] == tag][:20]:
        before, after = line["include"], spoil(line, kind, rng)["include"]
        keys = {"color": "color", "shape": "class", "count": "count", "position": "position"}
        changed = [
            key
            for old, new in zip(before, after, strict=True)
            for key in old.keys() | new.keys()
            if old[key] != new[key]
        ]
        assert changed == [keys[kind]]


def test_what_cannot_be_spoilt_is_told() -> None:
    line = split_prompts("train")[0]
    with pytest.raises(ValueError, match="cannot be spoilt by 'tie'"):
        spoil(line, "tie", np.random.default_rng(0))


def test_written_pairs_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets, the extra 'datasets', is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    drawn = DrawnPreferences(DrawnPairs(pairs=12, ties=0.3, label_noise=0.2))
    write_pairs(drawn, tmp_path / "pairs.parquet")
    read = read_image_preferences(str(tmp_path / "pairs.parquet"), PairFilter())
    direct = ImagePreferences(draw_pairs(DrawnPairs(pairs=12, ties=0.3, label_noise=0.2)), PairFilter())
    found, expected = (pairs.batch(range(12), [1.0] * 12) for pairs in (read, direct))
    assert found["prompt"] == expected["prompt"]
    assert torch.equal(found["label"], expected["label"])
    for key in ("img_0", "img_1"):
        assert all(torch.equal(a, b) for a, b in zip(found[key], expected[key], strict=True))


def test_flaws_are_those_that_are_asked_for() -> None:
    pairs = DrawnPreferences(DrawnPairs(pairs=200, ties=0.0, degraded=0.0, flaws=("count", "color")))
    assert set(pairs.kinds) == {"count", "color"}
    assert {line["tag"] for line in pairs.lines} == {"counting", "colors", "color_attr"}


def test_wrong_scenes_of_training_pairs_are_not_those_of_held_out_prompts() -> None:
    unseen = {content(line) for line in split_prompts("test")}
    rng, avoided = np.random.default_rng(0), 0
    for line in [line for line in split_prompts("train") if line["tag"] == "counting"]:
        plain = {content(spoil(line, "count", rng)) for _ in range(20)}
        spared = {content(spoil(line, "count", rng, unseen=unseen)) for _ in range(20)}
        if plain - unseen:  # there is another number than the held-out one
            assert spared == plain - unseen
            avoided += bool(plain & unseen)
    assert avoided > 0  # or there would be nothing to avoid
