"""`tiltflow score`: every source of images, every output, failures as rows, and going on after an interruption."""

import csv
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiltflow import cli
from tiltflow.commands import failure_causes
from tiltflow.commands import score as score_module
from tiltflow.data.images import ImageFile, find_images
from tiltflow.errors import ConfigError
from tiltflow.rewards import RewardModelOutput

BRIGHTNESS = "tests.rewards_for_tests.Brightness"
RANK = "tests.rewards_for_tests.Rank"
REDNESS = "tests.rewards_for_tests.Redness"  # reads no prompt


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of five images of growing red, of two sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        pixels = np.zeros((4 + index % 2, 6, 3), dtype=np.uint8)
        pixels[..., 0] = 50 * index
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def score(tmp_path: Path, *arguments: Any, output: str = "scores.jsonl") -> Path:
    """Run the command to its end and return its output file."""
    path = tmp_path / output
    assert cli.main(["score", *map(str, arguments), "--output", str(path)]) == 0
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(score(tmp_path, "--rewards", REDNESS, "--images", images))
    assert [Path(row["image"]).name for row in rows] == [f"{index}.png" for index in range(5)]
    assert [row["scores"]["Redness"] for row in rows] == pytest.approx([10 * 50 * i / 255 for i in range(5)], abs=1e-5)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["reward", "images", "mean", "std", "min", "max", "failed"]
    assert table[1].split() == ["Redness", "5", "3.922", "2.773", "0", "7.843", "0"]
    assert [path.name for path in tmp_path.iterdir()] == ["images", "scores.jsonl"]


def test_a_glob_with_prompts(images: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\na ring\n")
    rows = rows_of(
        score(
            tmp_path,
            *("--rewards", "tests.rewards_for_tests.NaNForStars"),
            *("--images", f"{images}/[12].png", "--prompts", tmp_path / "prompts.txt"),
        )
    )
    assert [row["prompt"] for row in rows] == ["a star", "a ring"]
    assert [row["scores"]["NaNForStars"] is None for row in rows] == [True, False]
    assert rows[0]["failures"] == {"NaNForStars": "not finite: the reward is NaN or infinite"}


def test_a_jsonl_file_with_metadata(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (214, 214, 208)).save(tmp_path / "empty.png")
    line = {"image": "empty.png", "prompt": "a photo of a star", "tag": "single_object"}
    (tmp_path / "list.jsonl").write_text(json.dumps({**line, "include": [{"class": "star", "count": 1}]}) + "\n")
    reward = "{reward_model: Geneval, detector: shapes, score: strict}"
    (row,) = rows_of(score(tmp_path, "--rewards", reward, "--images", tmp_path / "list.jsonl"))
    assert row["scores"] == {"Geneval": 0.0}
    assert (row["info"]["Geneval"]["tag"], row["info"]["Geneval"]["correct"]) == ("single_object", False)


def test_a_jsonl_file_of_images_with_a_file_of_prompts(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (214, 214, 208)).save(tmp_path / "empty.png")
    include = {"tag": "single_object", "include": [{"class": "star", "count": 1}]}
    (tmp_path / "images.jsonl").write_text(json.dumps({"image": "empty.png", "prompt": "replaced", "tag": "x"}) + "\n")
    (tmp_path / "bare.jsonl").write_text(json.dumps({"image": "empty.png", **include}) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a photo of a star", **include}) + "\n")
    (tmp_path / "prompts.txt").write_text("a photo of a star\n")
    reward = ("--rewards", "{reward_model: Geneval, detector: shapes, score: strict}", BRIGHTNESS)
    for images, prompts in (("bare.jsonl", "prompts.txt"), ("images.jsonl", "prompts.jsonl")):
        (row,) = rows_of(score(tmp_path, *reward, "--images", tmp_path / images, "--prompts", tmp_path / prompts))
        assert row["prompt"] == "a photo of a star" and row["scores"]["Geneval"] == 0.0
    (row,) = rows_of(score(tmp_path, "--rewards", REDNESS, "--images", tmp_path / "bare.jsonl"))
    assert row["prompt"] == ""


def test_a_reward_may_need_no_prompt_with_its_options(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens there: that is told row by row, and not that prompts are missing.
    judge = "{reward_model: vllm_evaluate, api_base_url: 'http://127.0.0.1:9/v1', max_retries: 0, QUESTION}"
    arguments = ["score", "--images", f"{images}/[01].png", "--output", str(tmp_path / "s.jsonl"), "--rewards"]
    assert cli.main([*arguments, judge.replace(", QUESTION", "")]) == 1
    assert "vllm_evaluate failed on 2 of 2 images" in capsys.readouterr().err
    assert cli.main([*arguments, judge.replace("QUESTION", "question: 'Is it {prompt}?'")]) == 2
    assert "'vllm_evaluate' requires 'prompt', which these images do not have" in capsys.readouterr().err
    monkeypatch.setattr(
        "tiltflow.commands.score.build_reward_model", lambda *_: (_ for _ in ()).throw(ConfigError("built"))
    )
    remote = "{reward_model: RemotePointwiseRewardModel, required_fields: [image], server_url: 'http://127.0.0.1:9'}"
    assert cli.main([*arguments, remote]) == 2
    assert capsys.readouterr().err == "tiltflow score: built\n"


def test_paths_in_the_home_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    options = ("--images=~/images/[01].png", "--prompts=~/prompts.txt", "--output=~/s.jsonl")
    assert cli.main(["score", "--rewards", REDNESS, *options]) == 0
    assert [row["prompt"] for row in rows_of(tmp_path / "s.jsonl")] == ["a", "b"]


def test_groups_of_images(images: Path, tmp_path: Path) -> None:
    options = ("--rewards", RANK, "--images", f"{images}/[0-3].png", "--group_size", 2)
    rows = rows_of(score(tmp_path, *options))
    assert [row["scores"]["Rank"] for row in rows] == [0.0, 0.5, 0.0, 0.5]
    assert [row["info"]["Rank"]["size"] for row in rows] == [2] * 4


def test_csv_and_several_rewards(images: Path, tmp_path: Path) -> None:
    rewards = ("--rewards", REDNESS, RANK, "--group_size", 5)
    path = score(tmp_path, *rewards, "--images", images, output="s.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "prompt", "Redness", "Rank", "Rank.size"]
    assert float(rows[4]["Redness"]) == pytest.approx(7.843137, abs=1e-5)


TALKATIVE = "tests.rewards_for_tests.Talkative"


def test_what_a_reward_tells_is_written_whole(images: Path, tmp_path: Path) -> None:
    first, second, *_ = rows_of(score(tmp_path, "--rewards", TALKATIVE, "--images", images))
    told = {"distance": None, "levels": [0.25, 0.75], "reasons": [], "mixed": 0, "boxes": {"star": [1, 2]}}
    assert first["info"]["Talkative"] == told  # NaN, which JSON does not know, is null
    assert second["info"]["Talkative"] == {**told, "reasons": ["too dark", "too small"], "mixed": "none"}


def test_lists_are_joined_in_csv(images: Path, tmp_path: Path) -> None:
    with score(tmp_path, "--rewards", TALKATIVE, "--images", images, output="s.csv").open(newline="") as file:
        _, row, *_ = csv.DictReader(file)
    assert (row["Talkative.levels"], row["Talkative.reasons"]) == ("0.25; 0.75", "too dark; too small")
    assert (row["Talkative.distance"], row["Talkative.boxes"]) == ("", '{"star": [1, 2]}')


def test_lists_are_lists_in_parquet(images: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, the extra 'parquet', is not installed")
    table = parquet.read_table(score(tmp_path, "--rewards", TALKATIVE, "--images", images, output="s.parquet"))
    columns = {name.removeprefix("Talkative."): table.column(name).to_pylist() for name in table.column_names}
    assert columns["levels"][1] == [0.25, 0.75] and columns["reasons"][:2] == [[], ["too dark", "too small"]]
    assert columns["mixed"][:2] == ["0", "none"] and columns["boxes"][0] == '{"star": [1, 2]}'
    assert columns["distance"] == [None] * 5


def test_parquet(images: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, the extra 'parquet', is not installed")
    path = score(tmp_path, "--rewards", REDNESS, "--images", images, output="s.parquet")
    assert parquet.read_table(path).column("Redness").to_pylist()[1] == pytest.approx(1.960784, abs=1e-5)


def test_parquet_without_pyarrow_is_told_before_anything_is_scored(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ["score", "--rewards", REDNESS, "--images", str(images), "--output", str(tmp_path / "s.parquet")]
    assert cli.main(arguments) == 2
    assert "pip install 'tiltflow[parquet]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_it_goes_on_where_it_stopped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows_of(score(tmp_path, "--rewards", REDNESS, "--images", images, output="whole.jsonl"))
    monkeypatch.setattr(score_module, "CHUNK", 2)
    scored: list[str] = []
    load = type(find_images(str(images))[0]).load

    def loading(self: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(self.path.name)
        return load(self)

    monkeypatch.setattr("tiltflow.data.images.ImageFile.load", loading)
    arguments = ["score", "--rewards", REDNESS, "--images", str(images), "--output", str(tmp_path / "s.jsonl")]
    assert cli.main(arguments) == 130
    part = tmp_path / "s.jsonl.part"
    assert len(part.read_text().splitlines()) == 3  # what it is of, and two rows
    part.write_text(part.read_text() + '{"image": "cut')
    scored[:] = ["anything"] * 4
    assert cli.main(arguments) == 0
    assert scored[4:] == ["2.png", "3.png", "4.png"]
    assert rows_of(tmp_path / "s.jsonl") == whole
    assert not part.exists()


def test_an_image_that_cannot_be_read_is_a_row_with_the_reason(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(whole[: len(whole) // 2])
    (images / "3.png").write_text("no image")
    (images / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 40)
    rewards = ("--rewards", REDNESS, RANK, "--group_size", 5)
    rows = rows_of(score(tmp_path, *rewards, "--images", images))
    assert [row["scores"]["Redness"] is None for row in rows] == [False, True, False, True, True]
    assert rows[2]["scores"]["Redness"] == pytest.approx(10 * 100 / 255, abs=1e-5)
    for row in (rows[1], rows[3], rows[4]):
        assert row["failures"]["Redness"] == row["failures"]["Rank"]
        assert row["failures"]["Rank"].startswith(f"DataError: image {row['image']} cannot be read: ")
        assert row["scores"] == {"Redness": None, "Rank": None} and row["info"] == {}
    told = capsys.readouterr().err
    assert f"Redness failed on 3 of 5 images, first on {images / '1.png'}: DataError: image ... cannot be read" in told


def test_a_group_is_scored_without_its_unreadable_image(images: Path, tmp_path: Path) -> None:
    (images / "1.png").write_text("no image")
    rank = ("--rewards", RANK, "--images", f"{images}/[0-3].png", "--group_size", 4)
    rows = rows_of(score(tmp_path, *rank))
    assert [row["scores"]["Rank"] for row in rows] == pytest.approx([0, None, 1 / 3, 2 / 3])
    assert rows[0]["info"]["Rank"] == {"size": 3}


def test_an_image_that_is_left_alone_in_its_group_has_no_rank(images: Path, tmp_path: Path) -> None:
    (images / "1.png").write_text("no image")
    rewards = ("--rewards", REDNESS, RANK, "--images", f"{images}/[0-3].png")
    rows = rows_of(score(tmp_path, *rewards, "--group_size", 2))
    assert [row["scores"]["Rank"] for row in rows] == [None, None, 0.0, 0.5]
    assert rows[0]["failures"] == {"Rank": "no other image of its group can be read"}
    assert rows[0]["scores"]["Redness"] == 0.0 and rows[0]["info"] == {}


@pytest.mark.parametrize("rewards", [[REDNESS], ["tests.rewards_for_tests.BreaksWithoutPrompt", REDNESS]])
def test_a_reward_that_scores_nothing_is_told_and_fails(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rewards: list[str]
) -> None:
    if len(rewards) == 1:
        for path in images.glob("*.png"):
            path.write_text("no image")
    arguments = ["score", "--rewards", *rewards, "--images", str(images), "--output", str(tmp_path / "s.jsonl")]
    assert cli.main(arguments) == 1
    told = capsys.readouterr().err.splitlines()
    name = rewards[0].rpartition(".")[2]
    cause = "ValueError: the judge is out" if len(rewards) == 2 else "DataError: image ... cannot be read: "
    assert told[0].startswith(f"{name} failed on 5 of 5 images, first on {images / '0.png'}: {cause}")
    assert told[1] == f"tiltflow score: no image has a score from: {name}"
    assert len(rows_of(tmp_path / "s.jsonl")) == 5  # what there is, is kept


def test_the_commonest_causes_come_first_and_are_few() -> None:
    causes = [f"cause {min(index, 6)} of a{index}.png" for index in range(9)]
    rows = [{"image": f"a{i}.png", "failures": {"r": cause}, "scores": {"r": None}} for i, cause in enumerate(causes)]
    lines = failure_causes(rows, limit=2).splitlines()
    assert lines[0] == "r failed on 3 of 9 images, first on a6.png: cause 6 of ..."
    assert lines[2] == "and 5 more causes" and len(lines) == 3
    assert failure_causes([{"image": "a", "failures": {}, "scores": {"r": 1.0}}]) == ""


LINES = [{"image": f"images/{index}.png", "prompt": f"prompt {index}", "tag": index} for index in range(4)]


def interrupted(tmp_path: Path, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **options: str) -> int:
    """Score the images of some lines, two at a time, as far as the third; or go on, if that happened before."""
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = {"--rewards": BRIGHTNESS, "--images": str(tmp_path / "list.jsonl"), "--group_size": "2", **options}
    monkeypatch.setattr(score_module, "CHUNK", 2)
    monkeypatch.setattr("tests.rewards_for_tests.Brightness.__call__", stop_at_the_third())
    return cli.main(
        ["score", *(word for pair in words.items() for word in pair), "--output", str(tmp_path / "s.jsonl")]
    )


def stop_at_the_third() -> Any:
    seen: list[str] = []

    def call(self: Any, prompt: list[str], image: Any = None) -> RewardModelOutput:
        seen.extend(prompt)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return RewardModelOutput([0.5] * len(prompt))

    return call


def test_rows_that_cannot_be_written_are_an_error_with_the_reason(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.jsonl.part").symlink_to(tmp_path / "gone" / "s.jsonl.part")
    output = str(tmp_path / "s.jsonl")
    assert cli.main(["score", "--rewards", REDNESS, "--images", str(images), "--output", output]) == 2
    assert "cannot write s.jsonl.part in" in (told := capsys.readouterr().err) and "No such file or directory" in told


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"prompt": "another"}, "other prompts;"),
        ({"tag": "another"}, "other metadata;"),
        ({"image": "images/4.png"}, "other images;"),
        ({"--group_size": "1"}, "other group_size;"),
        ({"--rewards": REDNESS}, "other rewards;"),
    ],
)
def test_a_part_file_of_another_scoring_says_what_differs(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    differing: str,
) -> None:
    assert interrupted(tmp_path, LINES, monkeypatch) == 130
    before = (tmp_path / "s.jsonl.part").read_bytes()
    options = {key: value for key, value in change.items() if key.startswith("--")}
    last = {**LINES[-1], **{key: value for key, value in change.items() if key not in options}}
    assert interrupted(tmp_path, [*LINES[:-1], last], monkeypatch, **options) == 2
    told = capsys.readouterr().err
    assert f"s.jsonl.part was begun with {differing}" in told and "remove the file to start afresh" in told
    assert (tmp_path / "s.jsonl.part").read_bytes() == before
    assert interrupted(tmp_path, LINES, monkeypatch) == 0
    assert [row["prompt"] for row in rows_of(tmp_path / "s.jsonl")] == [line["prompt"] for line in LINES]


def test_it_goes_on_with_a_reward_that_is_run_in_another_way(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted(tmp_path, LINES, monkeypatch) == 130
    kept = len((tmp_path / "s.jsonl.part").read_text().splitlines()) - 1
    again = f"{{reward_model: {BRIGHTNESS}, async_reward: true, timeout: 20}}"
    assert kept > 0
    assert interrupted(tmp_path, LINES, monkeypatch, **{"--batch_size": "4", "--rewards": again}) == 0
    assert len(rows_of(tmp_path / "s.jsonl")) == len(LINES)


def test_half_a_group_and_half_a_letter_are_scored_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{**line, "prompt": f"Größe {line['tag']}"} for line in LINES]
    assert interrupted(tmp_path, lines, monkeypatch) == 130
    part = tmp_path / "s.jsonl.part"
    head, group, rest = part.read_bytes().split(b"\n")
    assert rest == b""
    part.write_bytes(b"\n".join([head, group[: group.rindex("ö".encode()) + 1]]))
    assert interrupted(tmp_path, lines, monkeypatch) == 130  # after the first two again
    assert part.read_bytes().split(b"\n") == [head, group, b""]
    assert interrupted(tmp_path, lines, monkeypatch) == 0


def test_what_failed_is_scored_again_and_what_did_not_is_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "CHUNK", 2)
    asked: list[int] = []  # in how many images: the judge is out for two, then there for two, and then comes Ctrl-C

    def call(self: Any, prompt: Any = None, image: Any = None) -> RewardModelOutput:
        asked.append(len(image))
        if len(asked) == 1:
            raise ConnectionError("the judge is out")
        if len(asked) == 3:
            raise KeyboardInterrupt
        return RewardModelOutput([float(len(asked))] * len(image))

    monkeypatch.setattr("tests.rewards_for_tests.Redness.__call__", call)
    arguments = ["score", "--rewards", REDNESS, "--images", str(images), "--output", str(tmp_path / "s.jsonl")]
    assert cli.main(arguments) == 130
    assert cli.main(arguments) == 0
    assert asked == [2, 2, 1, 2, 1]
    rows = rows_of(tmp_path / "s.jsonl")
    assert [Path(row["image"]).name for row in rows] == [f"{index}.png" for index in range(5)]
    assert [row["scores"]["Redness"] for row in rows] == [4.0, 4.0, 2.0, 2.0, 5.0]
    assert not any(row["failures"] for row in rows)


def test_an_image_that_was_rendered_anew_is_scored_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{**line, "prompt": "a star"} for line in LINES]
    assert interrupted(tmp_path, lines, monkeypatch) == 130
    Image.new("RGB", (8, 8), (255, 0, 0)).save(images / "1.png")
    monkeypatch.undo()
    options = ("--rewards", BRIGHTNESS, "--images", tmp_path / "list.jsonl", "--group_size", 2)
    rows = rows_of(score(tmp_path, *options, output="s.jsonl"))
    assert [row["scores"]["Brightness"] for row in rows] == pytest.approx([0, 10, 10 * 100 / 255, 10 * 150 / 255])


def test_an_asynchronous_reward_begins_while_images_are_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    load = ImageFile.load

    def call(self: Any, prompt: Any = None, image: Any = None) -> RewardModelOutput:
        begun.set()
        return RewardModelOutput([1.0] * len(image))

    def loading(self: Any) -> Any:
        if self.path.name == "4.png":  # the last one
            assert begun.wait(60), "no image was handed over before all were read"
        return load(self)

    monkeypatch.setattr("tests.rewards_for_tests.Redness.__call__", call)
    monkeypatch.setattr("tiltflow.data.images.ImageFile.load", loading)
    reward = f"{{reward_model: {REDNESS}, async_reward: true, batch_size: 2}}"
    rows = rows_of(score(tmp_path, "--rewards", reward, "--images", images))
    assert [row["scores"]["Redness"] for row in rows] == [1.0] * 5


@pytest.mark.parametrize("content", ["rubbish\n", "[]\n", '{"rewards": []}\n7\n'])
def test_a_damaged_part_file_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "s.jsonl.part").write_text(content)
    assert interrupted(tmp_path, LINES, monkeypatch) == 2
    assert "s.jsonl.part is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "images 'nowhere': no image there; give a folder, a glob pattern or a .jsonl file"),
        (["--images", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--images", "IMAGES", "--prompts", "TWO"], "5 images in"),
        (["--images", "IMAGES", "--group_size", "2"], "--group_size 2 does not divide the 5 images"),
        (["--images", "IMAGES", "--rewards", RANK], "--group_size=1: reward 'Rank' compares the images of a prompt"),
        (
            ["--images", "IMAGES", "--prompts", "FIVE", "--rewards", RANK, "--group_size", "5"],
            "2.png are of one group, and their prompts are 'a' and 'b'; a group is so many images of one prompt in a",
        ),
        (["--images", "IMAGES", "--rewards", "Genevall"], "did you mean 'Geneval'?"),
        (["--images", "IMAGES", "--rewards", "{reward_model: Geneval, detector: shapes}"], "requires 'metadata'"),
        (["--images", "IMAGES", "--output", "s.xml"], "--output s.xml: ends in '.xml'; write .jsonl, .csv, .parquet"),
        (["--images", "IMAGES", "--lr", "1"], "--lr is no option of score"),
        (
            ["--images", "IMAGES", "--rewards", "tests.rewards_for_tests.CannotBeBuilt"],
            "reward 'CannotBeBuilt' requires 'prompt', which these images do not have; give --prompts FILE "
            "(a line per image) or a .jsonl",
        ),
        (["--images", "IMAGES", "--rewards", "OCR"], "reward 'OCR' requires 'prompt', which these images do not have"),
        (["--images", "NOIMAGE"], 'entry 1: has no "image"'),
    ],
)
def test_bad_input(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "none.jsonl").write_text('{"prompt": "a star"}\n')
    (tmp_path / "five.txt").write_text("a\na\nb\nb\nb\n")
    places = {"FIVE": "five.txt", "IMAGES": images, "TWO": "two.txt", "NOIMAGE": "none.jsonl"}
    words = [str(places.get(word, word)) for word in arguments]
    before = set(tmp_path.rglob("*"))
    assert cli.main(["score", *(["--rewards", REDNESS] if "--rewards" not in words else []), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert [path for path in set(tmp_path.rglob("*")) - before if path.is_file()] == []
