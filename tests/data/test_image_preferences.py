"""Pairs of images: where they are read from, what is left out and counted, and what is never trained on."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.data.image_preferences import PairFilter, collate, read_image_preferences
from tiltflow.errors import DataError

SKIP = PairFilter(on_bad_record="skip", on_bad_image="skip")


def pixels(seed: int, height: int = 12, width: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed: int, **size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, **size)).save(buffer, format="PNG")
    return buffer.getvalue()


def record(place: int, **changes: Any) -> dict[str, Any]:
    return {
        "jpg_0": png(2 * place, height=10 + place),
        "jpg_1": png(2 * place + 1, width=20 - place),
        "label_0": 1.0,
        "label_1": 0.0,
        "caption": f"prompt {place}",
    } | changes


def write_lines(folder: Path, *changes: Any, images: int = 8) -> Path:
    """Write a .jsonl file; a change is a dictionary over a good line, or a raw line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    for seed in range(images):
        (folder / "images" / f"{seed}.png").write_bytes(png(seed))
    good = {"image_0": "images/0.png", "image_1": "images/1.png", "label_0": 1, "label_1": 0, "prompt": "a cat"}
    lines = [change if isinstance(change, str) else json.dumps(good | change) for change in changes]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["parquet", "arrow", "folder of parquet", "folder of arrow", "saved", "glob", "image columns"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str | None]:
    """Write four pairs, the third a tie, and return a source and a split."""
    datasets = pytest.importorskip("datasets", reason="datasets, the extra 'datasets', is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    rows = [record(0), record(1, label_0=0.0, label_1=1.0), record(2, label_0=0.5, label_1=0.5), record(3)]
    table = datasets.Dataset.from_list(rows)
    if request.param == "image columns":
        for column in ("jpg_0", "jpg_1"):
            table = table.cast_column(column, datasets.Image())
    halves = [table.select(range(2)), table.select(range(2, 4))]
    match request.param:
        case "parquet" | "image columns":
            table.to_parquet(tmp_path / "pairs.parquet")
            return str(tmp_path / "pairs.parquet"), None
        case "arrow":
            table.save_to_disk(tmp_path / "saved")
            return str(next((tmp_path / "saved").glob("*.arrow"))), None
        case "saved":
            table.save_to_disk(tmp_path / "saved", num_shards=2)
            return str(tmp_path / "saved"), None
        case "glob":
            for index, half in enumerate(halves):
                half.to_parquet(tmp_path / f"train-{index}.parquet")
            halves[0].to_parquet(tmp_path / "test-0.parquet")
            return str(tmp_path / "train-*.parquet"), None
        case kind:
            (tmp_path / "set" / "train").mkdir(parents=True)
            for index, half in enumerate(halves):
                if kind == "folder of parquet":
                    half.to_parquet(tmp_path / "set" / "train" / f"{index}.parquet")
                else:
                    half.save_to_disk(tmp_path / f"half{index}")
                    arrow = next((tmp_path / f"half{index}").glob("*.arrow"))
                    arrow.rename(tmp_path / "set" / "train" / f"{index}.arrow")
            return str(tmp_path / "set"), "train"


def test_stored_pairs(stored: tuple[str, str | None]) -> None:
    source, split = stored
    pairs = read_image_preferences(source, PairFilter(), split=split)
    assert (len(pairs), list(pairs.lengths), pairs.notes) == (4, [1, 1, 1, 1], {})
    batch = pairs.batch([3, 0, 2], [1, 1, 1])
    assert batch["prompt"] == ["prompt 3", "prompt 0", "prompt 2"]
    assert batch["label"].tolist() == [[1, 0], [1, 0], [0.5, 0.5]]
    assert batch["weight"].tolist() == [1, 1, 1]
    for row, place in enumerate((3, 0, 2)):
        assert torch.equal(batch["img_0"][row], torch.from_numpy(pixels(2 * place, height=10 + place)))
        assert torch.equal(batch["img_1"][row], torch.from_numpy(pixels(2 * place + 1, width=20 - place)))
    assert len(read_image_preferences(source, PairFilter(filter_ties=True), split=split)) == 3


def test_lines_of_json(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path,
        {},
        "",
        {"image_0": "images/2.png", "image_1": str(tmp_path / "images" / "3.png"), "label_0": 0.25, "label_1": 0.75},
    )
    pairs = read_image_preferences(str(path), PairFilter())
    batch = pairs.batch([1], [1])
    assert torch.equal(batch["img_0"][0], torch.from_numpy(pixels(2)))
    assert torch.equal(batch["img_1"][0], torch.from_numpy(pixels(3)))
    assert batch["label"].tolist() == [[0.25, 0.75]]
    assert batch["img_0"][0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file or folder"),
        ("empty", "the folder has no file that ends in .jsonl, .parquet, .arrow"),
        ("empty.jsonl", "is empty: it holds no record"),
        ("mixed", "mixed; name one kind"),
        ("broken.parquet", "cannot be read"),
        ("broken.arrow", "cannot be read"),
        ("columns.parquet", "no column image_1 or jpg_1, label_1; it has"),
        ("rows.parquet", "is empty: it holds no record"),
    ],
)
def test_sources_that_are_none(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets, the extra 'datasets', is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([record(0)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_text("{}")
    for place in ("broken.parquet", "broken.arrow", "mixed/b.parquet"):
        (tmp_path / place).write_bytes(b"no table")
    parquet.write_table(table.drop_columns(["jpg_1", "label_1"]), tmp_path / "columns.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        read_image_preferences(str(tmp_path / name), PairFilter())


def test_a_hub_set_that_is_out_of_reach() -> None:
    pytest.importorskip("datasets", reason="datasets, the extra 'datasets', is not installed")
    with pytest.raises(DataError, match="no such file or folder, and no data set of the hub that can be loaded"):
        read_image_preferences("nobody/nothing_of_the_kind", PairFilter())


def test_the_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "pairs.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"pip install 'tiltflow\[datasets\]'"):
        read_image_preferences(str(tmp_path / "pairs.parquet"), PairFilter())


# --- bad records ------------------------------------------------------------------------------------------------------

OUT = "label out of range"
BAD_LINES = [
    ("{not json", "line 2: broken JSON: not valid JSON", "broken JSON"),
    ("[1]", r"line 2: broken JSON: .* an object is needed, not '\[1\]'", "broken JSON"),
    ('{"image_0": "images/0.png"}', "line 2: missing key: no image_1, label_0, label_1, prompt", "missing key"),
    ({"image_1": 3}, "line 2: no path: image_1 is 3; it must be the path", "no path"),
    ({"prompt": " "}, "line 2: no text: the prompt must be a text that is not empty; it is ' '", "no text"),
    ({"prompt": None}, "line 2: no text: the prompt must .* it is None", "no text"),
    (
        {"label_0": 1.5, "label_1": -0.5},
        r"line 2: label out of range: label_0 is 1.5 and label_1 is -0.5; they must lie in \[0, 1\]",
        OUT,
    ),
    ({"label_0": 1, "label_1": 1}, "line 2: label out of range: label_0 is 1 and label_1 is 1; .* add up to 1", OUT),
    ({"label_0": "1"}, "line 2: no number: label_0 is '1'; it must be a number", "no number"),
    ({"label_0": True}, "line 2: no number: label_0 is True", "no number"),
]


@pytest.mark.parametrize(("line", "message", "name"), BAD_LINES)
def test_a_bad_record_is_an_error_or_counted(line: Any, message: str, name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, {}, line, {"image_0": "images/4.png"})
    with pytest.raises(DataError, match=message) as caught:
        read_image_preferences(str(path), PairFilter())
    assert "on_bad_record: skip" in str(caught.value)
    assert str(path) in str(caught.value)
    pairs = read_image_preferences(str(path), SKIP)
    assert (len(pairs), pairs.notes) == (2, {name: 1})
    assert torch.equal(pairs.batch([1], [1])["img_0"][0], torch.from_numpy(pixels(4)))


def test_a_set_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *(["{"] * 5))
    with pytest.raises(DataError, match=r"none of 5 is left \(5 broken JSON\)"):
        read_image_preferences(str(path), SKIP)


def test_what_nobody_judged_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {}, {"label_0": 0, "label_1": 0}, {"has_label": False}, {"has_label": True})
    pairs = read_image_preferences(str(path), PairFilter())
    assert (len(pairs), pairs.notes) == (2, {"unlabelled": 2})


def test_filters_count_what_they_leave_out(tmp_path: Path) -> None:
    tie = {"label_0": 0.5, "label_1": 0.5}
    path = write_lines(tmp_path, {}, tie, {}, {"prompt": "a dog"}, {}, tie)
    rules = PairFilter(filter_ties=True, pairs_per_prompt=2)
    pairs = read_image_preferences(str(path), rules)
    assert pairs.notes == {"tie": 2, "over pairs_per_prompt": 1}
    assert pairs.batch([0, 1, 2], [1, 1, 1])["prompt"] == ["a cat", "a cat", "a dog"]
    assert pairs.prompts == ["a cat", "a dog"]


def test_weights_by_prompt_count_the_pairs_that_are_used(tmp_path: Path) -> None:
    tie = {"label_0": 0.5, "label_1": 0.5}
    path = write_lines(tmp_path, {}, {}, tie, {"prompt": "a dog"})
    pairs = read_image_preferences(str(path), PairFilter(filter_ties=True, weight_by_prompt=True))
    assert pairs.batch([0, 1, 2], [1, 0, 1])["weight"].tolist() == [0.5, 0, 1]


# --- bad images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "no image", "cut off"])
def test_a_bad_image_is_an_error_or_weighs_nothing(damage: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, {}, {"image_1": "images/5.png"}, {"image_0": "images/4.png"})
    target = tmp_path / "images" / "5.png"
    match damage:
        case "missing":
            target.unlink()
        case "no image":
            target.write_text("hello")
        case _:
            target.write_bytes(target.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"pairs.jsonl, line 2: an image cannot be read.*on_bad_image"):
        read_image_preferences(str(path), PairFilter()).batch([0, 1], [1, 1])
    pairs = read_image_preferences(str(path), SKIP)
    batch = pairs.batch([0, 1, 2], [1, 1, 1])
    assert batch["weight"].tolist() == [1, 0, 1]
    assert batch["skipped"].tolist() == [0, 1, 0]
    assert torch.equal(batch["img_0"][0], torch.from_numpy(pixels(0)))
    assert torch.equal(batch["img_0"][2], torch.from_numpy(pixels(4)))
    assert (pairs.found, pairs.notes) == ({1: "unreadable image"}, {"unreadable image": 1})


def test_a_preferred_image_that_is_the_other_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    same = {"image_1": "images/0.png"}
    path = write_lines(tmp_path, {}, same, same | {"label_0": 0.5, "label_1": 0.5})
    with pytest.raises(DataError, match="line 2: the preferred image is the other one"):
        read_image_preferences(str(path), PairFilter(on_bad_image="skip")).batch([0, 1, 2], [1, 1, 1])
    pairs = read_image_preferences(str(path), SKIP)
    assert pairs.batch([0, 1, 2], [1, 1, 1])["weight"].tolist() == [1, 0, 1]
    assert pairs.found == {1: "identical images"}


def test_rows_that_fill_up_a_batch_are_not_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {}, {"image_1": "images/gone.png"})
    pairs = read_image_preferences(str(path), PairFilter())
    batch = pairs.batch([0, 1], [1, 0])
    assert (batch["weight"].tolist(), batch["skipped"].tolist()) == ([1, 0], [0, 0])
    assert (pairs.notes, pairs.found) == ({}, {})


def test_images_of_other_modes_become_rgb(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {})
    Image.fromarray(pixels(0)).convert("L").save(tmp_path / "images" / "0.png")
    Image.fromarray(pixels(1)).convert("RGBA").save(tmp_path / "images" / "1.png")
    batch = read_image_preferences(str(path), PairFilter()).batch([0], [1])
    assert batch["img_0"][0].shape == batch["img_1"][0].shape == (12, 10, 3)
    assert torch.equal(batch["img_1"][0], torch.from_numpy(pixels(1)))


def test_collate_keeps_sizes() -> None:
    rows = [
        {
            "img_0": torch.zeros(size, 4, 3),
            "img_1": torch.zeros(3, size, 3),
            "prompt": str(size),
            "label": torch.tensor([0.0, 1.0]),
            "weight": 0.5,
            "skipped": False,
        }
        for size in (5, 7)
    ]
    batch = collate(rows)
    assert [tuple(image.shape) for image in (*batch["img_0"], *batch["img_1"])] == [
        (5, 4, 3),
        (7, 4, 3),
        (3, 5, 3),
        (3, 7, 3),
    ]
    assert batch["label"].shape == (2, 2)
