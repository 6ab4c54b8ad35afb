"""Named prompt sets, prompt files, and the message for everything that can be wrong with one."""

from collections import Counter
from pathlib import Path

import pytest

from tiltflow.data import PROMPT_SETS, load_prompts, read_prompt_file
from tiltflow.errors import DataError

OFFICIAL_TAGS = {
    "position": 100,
    "color_attr": 100,
    "two_object": 99,
    "colors": 94,
    "single_object": 80,
    "counting": 80,
}


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# --- named sets -------------------------------------------------------------------------------------------------------


def test_the_named_sets() -> None:
    assert tuple(PROMPT_SETS) == ("shapes", "words", "geneval", "ocr", "pickscore", "drawbench")


def test_the_official_geneval_prompts_come_with_the_package() -> None:
    prompts = load_prompts("geneval", split="test")
    assert len(prompts) == 553
    assert Counter(prompt.metadata["tag"] for prompt in prompts) == OFFICIAL_TAGS
    assert len({prompt.text for prompt in prompts}) == 553
    assert prompts[0].text == "a photo of a bench"
    assert prompts[0].metadata == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}


def test_every_counting_line_of_the_official_prompts_excludes_one_more() -> None:
    for prompt in load_prompts("geneval", split="test"):
        if prompt.metadata["tag"] == "counting":
            (asked,) = prompt.metadata["include"]
            assert prompt.metadata["exclude"] == [{"class": asked["class"], "count": asked["count"] + 1}]


@pytest.mark.parametrize(("name", "count"), [("ocr", 1018), ("drawbench", 200)])
def test_packaged_text_sets(name: str, count: int) -> None:
    prompts = load_prompts(name, split="test")
    assert len(prompts) == count
    assert all(prompt.text and not prompt.metadata for prompt in prompts)
    if name == "ocr":
        assert all(prompt.text.count('"') >= 2 for prompt in prompts)


@pytest.mark.parametrize("split", ["train", "test"])
def test_shapes_have_metadata_without_the_prompt(split: str) -> None:
    prompts = load_prompts("shapes", split="train" if split == "train" else "test")
    assert set(prompts[0].metadata) == {"tag", "include"}
    assert {prompt.metadata["tag"] for prompt in prompts} == set(OFFICIAL_TAGS)


@pytest.mark.parametrize(("split", "count"), [("train", 430), ("test", 107)])
def test_words_have_their_word_as_metadata(split: str, count: int) -> None:
    prompts = load_prompts("words", split="train" if split == "train" else "test")
    assert len(prompts) == count
    assert all(prompt.text == f'a sign that says "{prompt.metadata["word"]}"' for prompt in prompts)
    assert {prompt.metadata["tag"] for prompt in prompts} == {"two_letters", "three_letters", "four_letters"}


@pytest.mark.parametrize(("name", "split"), [("ocr", "train"), ("pickscore", "test"), ("drawbench", "train")])
def test_a_split_that_does_not_come_along_says_where_to_put_it(
    name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"the {split} prompts of '{name}' do not come.*prompts/{name}/{split}\.txt"):
        load_prompts(name, split="train" if split == "train" else "test")


def test_a_split_that_does_not_come_along_is_read_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts" / "ocr").mkdir(parents=True)
    write(tmp_path / "prompts" / "ocr" / "train.txt", 'a sign that says "open"')
    assert [prompt.text for prompt in load_prompts("ocr", split="train")] == ['a sign that says "open"']


def test_a_file_of_the_working_directory_never_replaces_an_official_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts" / "geneval").mkdir(parents=True)
    write(tmp_path / "prompts" / "geneval" / "test.txt", "something else")
    assert len(load_prompts("geneval", split="test")) == 553


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "  a red circle ", "", "two stars\r", "一只猫")
    prompts = read_prompt_file(path)
    assert [prompt.text for prompt in prompts] == ["a red circle", "two stars", "一只猫"]
    assert [dict(prompt.metadata) for prompt in prompts] == [{}, {}, {}]


def test_a_jsonl_file_keeps_everything_but_the_prompt_as_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a cat", "tag": "colors", "n": [1, 2]}', "", '{"prompt": "a dog"}')
    first, second = load_prompts(str(path), split="test")
    assert (first.text, first.metadata) == ("a cat", {"tag": "colors", "n": [1, 2]})
    assert (second.text, second.metadata) == ("a dog", {})


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"\xef\xbb\xbfa cat\n")
    lines.write_bytes(b'\xef\xbb\xbf{"prompt": "a cat"}\n')
    assert [read_prompt_file(path)[0].text for path in (text, lines)] == ["a cat", "a cat"]


def test_a_unicode_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a cat\u2028on a mat"}')
    assert [prompt.text for prompt in read_prompt_file(path)] == ["a cat\u2028on a mat"]


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_missing_file_names_the_sets() -> None:
    with pytest.raises(DataError, match=r"'no/such/file.txt': no such file or set.*shapes, words, geneval, ocr"):
        load_prompts("no/such/file.txt", split="train")


def test_a_mistyped_set_is_suggested() -> None:
    with pytest.raises(
        DataError, match="'shape': no such file or set; did you mean 'shapes'\\?\\. Named sets: shapes, "
    ):
        load_prompts("shape", split="train")


@pytest.mark.parametrize("text", ["", "\n  \n\t\n"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_empty_file(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"empty\{suffix} is empty; write at least one prompt"):
        load_prompts(str(path), split="train")


def test_wrong_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.csv", "a cat")
    with pytest.raises(DataError, match=r"ends in '\.csv'; write \.txt .* or \.jsonl"):
        load_prompts(str(path), split="train")


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    folder = tmp_path / "prompts.txt"
    folder.mkdir()
    with pytest.raises(DataError, match=r"cannot be read: .*Is a directory"):
        load_prompts(str(folder), split="train")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("une fenêtre\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt cannot be read: 'utf-8.* codec can't decode"):
        load_prompts(str(path), split="train")


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a cat"}', "", '{"prompt": "a dog"', '{"prompt": "a cow"}')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not valid JSON: "):
        load_prompts(str(path), split="train")


@pytest.mark.parametrize(
    "line", ['{"text": "a dog"}', '["a dog"]', '"a dog"', "3", '{"prompt": null}', '{"prompt": "  "}', '{"prompt": 3}']
)
def test_a_line_without_a_prompt_names_the_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a cat"}', line)
    with pytest.raises(DataError, match=r'a\.jsonl, line 2: needs an object with a non-empty "prompt" string; got '):
        load_prompts(str(path), split="train")


# --- blocklist --------------------------------------------------------------------------------------------------------


def test_blocklist_leaves_prompts_out_whatever_their_case(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a Gun on a table", "a shotgun", "a rose")
    prompts = load_prompts(str(path), split="train", blocklist=("GUN", "knife"))
    assert [prompt.text for prompt in prompts] == ["a rose"]


def test_a_blocklist_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a gun", "a knife")
    with pytest.raises(DataError, match="the blocklist leaves none of 2 prompts"):
        load_prompts(str(path), split="train", blocklist=("a",))
