"""Where records lie: splits of folders, what `datasets` leaves beside its files, numbers of rows, and the hub."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_image_preferences import pixels, png, record, write_lines
from tiltflow.data.image_preferences import PairFilter, read_image_preferences
from tiltflow.data.pair_sources import open_pairs
from tiltflow.data.sources import open_source
from tiltflow.errors import DataError

datasets = pytest.importorskip("datasets", reason="datasets, the extra 'datasets', is not installed")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")


def shard(path: Path, *names: str) -> None:
    """Write a Parquet file with a row for each name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([{"text": name} for name in names]), path)


def texts(source: Path | str, split: str | None = None) -> list[str]:
    return open_source(str(source), split=split).column(["text"])


def test_a_source_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shard(tmp_path / "set" / "test.parquet", "a")
    assert texts("~/set/test.parquet") == texts("~/set@test") == texts("~/s*/*.parquet") == ["a"]


@pytest.mark.parametrize("inner", ["", "data"])
def test_the_splits_of_a_hub_repository_that_was_downloaded(tmp_path: Path, inner: str) -> None:
    folder = tmp_path / "set" / inner
    shard(folder / "train-00000-of-00002.parquet", "a", "b")
    shard(folder / "train-00001-of-00002.parquet", "c")
    shard(folder / "train-extra-00000-of-00001.parquet", "e")
    shard(folder / "validation_unique-00000-of-00001-0123456789abcdef.parquet", "d")
    source = tmp_path / "set"
    assert texts(source, "train") == texts(f"{source}@train") == ["a", "b", "c"]
    assert texts(source, "validation_unique") == texts(f"{source}@validation_unique", "validation_unique") == ["d"]
    with pytest.raises(
        DataError, match=r"it holds the splits train, train-extra, validation_unique; give one, as .*set@train"
    ):
        texts(source)
    with pytest.raises(
        DataError, match="there is no split 'test'; it holds the splits train, train-extra, validation_unique"
    ):
        texts(source, "test")
    (source / "notes.jsonl").write_text("{}")
    assert texts(source, "train") == ["a", "b", "c"]
    with pytest.raises(DataError, match="split='train' is another one than the source's @validation_unique"):
        texts(f"{source}@validation_unique", "train")


def test_a_split_does_not_choose_from_files(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", "a")
    for source in ("train-0.parquet", "*.parquet"):
        assert texts(tmp_path / source) == ["a"]
        with pytest.raises(DataError, match="split='validation' chooses from a folder"):
            texts(tmp_path / source, "validation")
        with pytest.raises(DataError, match="split='validation' chooses from a folder"):
            read_image_preferences(str(tmp_path / source), PairFilter(), split="validation")


def test_a_pattern_takes_only_files_of_records(tmp_path: Path) -> None:
    shard(tmp_path / "set" / "a.parquet", "a")
    (tmp_path / "set" / "README.md").write_text("words")
    assert texts(tmp_path / "set" / "*") == ["a"]
    for source in ("*", "set/*.md"):
        with pytest.raises(DataError, match="no such file or folder, and nothing that the pattern matches"):
            texts(tmp_path / source)


def test_folders_with_one_split_or_none_in_their_names(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / "numbers" / f"{number}.parquet", "a")
        shard(tmp_path / "parts" / f"train_{number}.parquet", "b")
        shard(tmp_path / "saved" / f"data-0000{number}-of-00002.parquet", "c")
    shard(tmp_path / "two" / "train.parquet", "d")
    shard(tmp_path / "two" / "test.parquet", "e")
    shard(tmp_path / "own" / "mine-0.parquet", "f")
    shard(tmp_path / "own" / "yours-0.parquet", "g")
    shard(tmp_path / "last" / "helpful-base-train.parquet", "j")
    shard(tmp_path / "last" / "helpful_base_test.parquet", "k")
    shard(tmp_path / "folders" / "train" / "0.parquet", "h")
    shard(tmp_path / "folders" / "test" / "0.parquet", "i")
    assert [texts(tmp_path / name) for name in ("numbers", "parts", "saved")] == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert texts(tmp_path / "two", "test") == ["e"]
    assert texts(tmp_path / "last", "train") == ["j"]
    assert texts(tmp_path / "own", "mine") == ["f"]
    with pytest.raises(DataError, match="there is no split 'mine'; the folder has no file that ends in"):
        texts(tmp_path / "numbers", "mine")
    assert texts(tmp_path / "folders", "test") == ["i"]
    for name in ("two", "folders", "last"):
        with pytest.raises(DataError, match="it holds the splits test, train; give one"):
            texts(tmp_path / name)
    with pytest.raises(DataError, match="it holds the splits test, train; give one"):
        texts(tmp_path / "folders", "validation")


def test_what_datasets_keeps_beside_a_saved_set_is_not_read(tmp_path: Path) -> None:
    saved = tmp_path / "all" / "train"
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])}).save_to_disk(
        str(tmp_path / "all")
    )
    datasets.load_from_disk(str(saved)).map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=True)
    assert list(saved.glob("cache-*.arrow"))
    assert texts(saved) == texts(tmp_path / "all", "train") == ["a", "b"]
    with pytest.raises(DataError, match="it was saved without splits; leave split='train' out"):
        texts(saved, "train")
    with pytest.raises(DataError, match="there is no split 'test'; it holds the splits train"):
        texts(tmp_path / "all", "test")


def test_rows_are_counted_from_one_in_each_file(tmp_path: Path) -> None:
    rows = [record(place) for place in range(3)]
    folder = tmp_path / "set"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), folder / "0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]).slice(0, 0), folder / "1.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), folder / "2.parquet")
    pairs = open_pairs(str(folder))
    assert [pairs.where(place) for place in range(3)] == [
        f"{folder / '0.parquet'}, row 1",
        f"{folder / '0.parquet'}, row 2",
        f"{folder / '2.parquet'}, row 1",
    ]
    assert [pairs.images(place)[0] for place in range(3)] == [row["jpg_0"] for row in rows]


def test_a_set_is_opened_without_a_look_at_each_row(tmp_path: Path) -> None:
    rows = 100_000
    labels = [float(place % 2) for place in range(rows)]
    columns = {
        "label_0": labels,
        "label_1": [1 - label for label in labels],
        "caption": ["a cat", "a dog"] * (rows // 2),
    }
    table = pyarrow.table({"jpg_0": [b"a"] * rows, "jpg_1": [b"b"] * rows, **columns})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    before = time.process_time()
    assert len(read_image_preferences(str(tmp_path / "a.arrow"), PairFilter(weight_by_prompt=True))) == rows
    assert time.process_time() - before < 1.5  # 0.3 s; reading row by row took 4


def test_pairs_of_the_hub_are_asked_for_as_texts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([record(0)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert open_pairs("owner/name:small@validation_unique").where(0) == "owner/name:small@validation_unique, row 1"
    open_pairs("owner/name", split="test")
    open_pairs("owner/name")
    assert asked == [
        ("owner/name", "small", "validation_unique"),
        ("owner/name", None, "test"),
        ("owner/name", None, "train"),
    ]


def test_own_names_of_columns_of_pairs(tmp_path: Path) -> None:
    rows = [{"left": png(0), "jpg_1": png(1), "label_0": 1, "label_1": 0, "instruction": "a cat"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column image_0 or jpg_0, prompt or caption; it has left, jpg_1"):
        open_pairs(str(tmp_path / "a.parquet"))
    pairs = open_pairs(str(tmp_path / "a.parquet"), columns={"prompt": "instruction", "image_0": "left"})
    assert (pairs.prompts, pairs.images(0)) == (["a cat"], (png(0), png(1)))
    with pytest.raises(DataError, match="no record has 'instrution', which prompt is to be read from"):
        open_pairs(str(tmp_path / "a.parquet"), columns={"prompt": "instrution"})
    with pytest.raises(DataError, match="columns: 'promt' is none of image_0, image_1, label_0, label_1, prompt"):
        open_pairs(str(tmp_path / "a.parquet"), columns={"promt": "instruction"})


def test_a_table_may_name_files(tmp_path: Path) -> None:
    write_lines(tmp_path, {})
    row = record(0) | {"jpg_0": "images/0.png", "jpg_1": "images/1.png"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (image,) = read_image_preferences(str(tmp_path / "a.parquet"), PairFilter()).batch([0], [1])["img_1"]
    assert (image.numpy() == pixels(1)).all()


def test_weights_by_the_column_that_pick_a_pic_has(tmp_path: Path) -> None:
    rows = [record(place, caption="same", num_example_per_prompt=4) for place in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    batch = read_image_preferences(str(tmp_path / "a.parquet"), PairFilter(weight_by_prompt=True)).batch([0, 1], [1, 1])
    assert batch["weight"].tolist() == [0.25, 0.25]


def test_labels_that_nobody_gave_may_be_missing(tmp_path: Path) -> None:
    rows = [record(0, has_label=True), record(1, has_label=False, label_0=None, label_1=None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = read_image_preferences(str(tmp_path / "a.parquet"), PairFilter())
    assert (len(pairs), pairs.notes) == (1, {"unlabelled": 1})
    parquet.write_table(
        pyarrow.Table.from_pylist([*rows, record(2, has_label=True, label_0=None)]), tmp_path / "b.parquet"
    )
    with pytest.raises(DataError, match="row 3: no number: label_0 is None"):
        read_image_preferences(str(tmp_path / "b.parquet"), PairFilter())
