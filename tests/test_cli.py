"""The command line in-process: what it prints, and that bad input ends with one line, status 2 and no output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import run_values
from tiltflow import cli
from tiltflow.config import load_pretrain_config, load_run_config, run_config
from tiltflow.errors import GeometryError
from tiltflow.training.trainer import TrainConfig, check_geometry

Failing = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, random_sd3: Path) -> Callable[..., Path]:
    """Return a function that writes the config of a seconds-long run into `run.yaml`, sections merged over it."""

    def _write(**sections: Any) -> Path:
        path = tmp_path / "run.yaml"
        values = run_values(random_sd3, tmp_path / "out")
        for key, value in sections.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(values))
        return path

    return _write


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Return a function that runs a command which must fail, and gives the one line that it says."""
    monkeypatch.chdir(tmp_path)  # defaults such as outputs/ would show up here

    def _failing(*arguments: Any) -> str:
        before = set(tmp_path.rglob("*"))
        assert cli.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert captured.err.endswith("\n")
        lines = captured.err.rstrip("\n").split("\n")
        assert len(lines) == 1, lines
        command = f"tiltflow {arguments[0]}: "
        assert lines[0].startswith(command)
        assert not {path for path in tmp_path.rglob("*") if path not in before and "out" in path.parts[-1]}
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "outputs").exists()
        return lines[0].removeprefix(command)

    return _failing


# --- print-config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes_ram", "words_ram", "geneval_sd3", "ocr_sd3", "pickscore_sd3"])
def test_print_config_prints_the_resolved_config_as_yaml(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", name, "--print-config", "--lr", "2e-5", "--rank=3", "--wandb_project", "mine"]) == 0
    printed = run_config(yaml.safe_load(capsys.readouterr().out), source="printed")
    assert printed == load_run_config(name, [("lr", "2e-5"), ("rank", "3"), ("wandb_project", "mine")])
    assert (printed.train.lr, printed.policy.lora.rank, printed.tracking.wandb_project) == (2e-5, 3, "mine")
    assert printed.output_dir == f"outputs/{name}"


def test_print_config_of_pretraining(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["pretrain", "tiny_sd3", "--print-config", "--steps", "7"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert load_pretrain_config(str(path)) == load_pretrain_config("tiny_sd3", [("steps", "7")])
    assert (yaml.safe_load(printed)["steps"], yaml.safe_load(printed)["autoencoder"]["steps"]) == (7, 2400)


def test_print_config_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "shapes_ram", "--print-config"]) == 0
    assert list(tmp_path.iterdir()) == []


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr"], "--lr needs a value"),
        (["--lr", "--rank", "3"], "--lr needs a value"),
        (["lr", "3"], "'lr' belongs to no option; options are written --name value, and a list, a pattern"),
        (["--lr", "1", "2"], "'2' belongs to no option; options are written --name value, and a list, a pattern"),
        (["-lr", "3"], "'-lr' belongs to no option; options are written --name value, and a list, a pattern"),
        (["--train.lrr", "1"], "--train.lrr is not a key of the config; nearest: train.lr, train"),
        (
            ["--batch_size", "1"],
            "--batch_size is ambiguous; it could be: train.batch_size, sampler.batch_size, evaluat",
        ),
    ],
)
def test_wrong_arguments(failing: Failing, arguments: list[str], expected: str) -> None:
    assert failing("train", "shapes_ram", *arguments).startswith(expected)


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_the_config_comes_before_its_overrides(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--lr", "1e-4", "shapes_ram"])
    assert ended.value.code == 2
    assert f"--lr: the config comes first: tiltflow {command} CONFIG --lr ..." in capsys.readouterr().err


def test_negative_numbers_are_values(failing: Failing) -> None:
    assert "train.lr=-1" in failing("train", "shapes_ram", "--lr", "-1")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["sample", "--model_name", "tiny_sd3"]])
def test_usage_errors_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: tiltflow" in capsys.readouterr().err


# --- configs ----------------------------------------------------------------------------------------------------------


def test_missing_config(failing: Failing) -> None:
    assert failing("train", "nowhere/run.yaml").startswith("config 'nowhere/run.yaml': no such file; packaged: ")
    assert "did you mean 'shapes_ram'" in failing("train", "shape_ram")


def test_a_config_of_the_other_command(failing: Failing) -> None:
    assert failing("train", "tiny_sd3").endswith("is a pretraining config; use it with: tiltflow pretrain tiny_sd3")
    wrong = failing("pretrain", "shapes_ram")
    assert wrong.endswith("is the config of a training run; use it with: tiltflow train shapes_ram")


def test_malformed_config(failing: Failing, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {lr: [}\n")
    assert failing("train", path).startswith(f"config {path} is not valid YAML: line 1: ")


def test_unknown_key_of_a_config(failing: Failing, write: Callable[..., Path]) -> None:
    path = write(train={"lrr": 1})
    assert failing("train", path) == f"{path}: unknown key 'train.lrr'; did you mean 'train.lr'?"


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"epochs": -1}),
        ("train", {"lr": 0}),
        ("train", {"lr": -1e-4}),
        ("train", {"batch_size": 0}),
        ("train", {"save_every": 0}),
        ("train", {"num_prompts_per_epoch": 0}),
        ("train", {"weight_decay": -1}),
        ("train", {"ema_decay": 1.5}),
        ("sampler", {"num_steps": 0}),
        ("sampler", {"batch_size": 0}),
        ("evaluation", {"images_per_prompt": 0}),
        ("algorithm", {"num_noisings": 0}),
        ("train", {"evaluate_every": 0}),
    ],
)
def test_sizes_and_rates_out_of_range(
    failing: Failing, write: Callable[..., Path], section: str, values: dict[str, Any]
) -> None:
    assert f"{section}.{next(iter(values))}" in failing("train", write(**{section: values}))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"policy": {"frozen_dtype": "bf16"}}, "precision=fp32 cannot compute with frozen_dtype=bf16; set it to fp32"),
        (
            {"policy": {"finetune": "full", "precision": "bf16", "frozen_dtype": "bf16"}},
            "frozen_dtype=bf16 has no use with finetune=full; leave it out",
        ),
        ({"train": {"advantage_aggregation": "gdpo", "advantage_std": "group"}}, "leave advantage_std=global"),
    ],
)
def test_values_that_do_not_fit_together(
    failing: Failing, write: Callable[..., Path], sections: dict[str, Any], expected: str
) -> None:
    assert expected in failing("train", write(**sections))


def test_group_size_below_two(failing: Failing, write: Callable[..., Path]) -> None:
    assert "train.group_size=1" in failing("train", write(), "--group_size", "1")


def test_epoch_sizes_that_the_processes_do_not_divide() -> None:
    config = TrainConfig(num_prompts_per_epoch=16)
    check_geometry(config, 4)
    with pytest.raises(
        GeometryError, match=r"train\.num_prompts_per_epoch=16 must be a positive multiple of 3 .*15 or"
    ):
        check_geometry(config, 3)
    with pytest.raises(GeometryError, match=r"nearest legal: 15 or 18$"):
        check_geometry(config, 3)
    with pytest.raises(GeometryError, match=r"nearest legal: 24 or 48$"):
        check_geometry(config, 24)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["prompts", "eval_prompts"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "no such file or set"),
        ("empty.txt", "\n", "is empty; write at least one prompt"),
        ("broken.jsonl", '{"prompt": "a star"}\n{"prompt": \n', "broken.jsonl, line 2: not valid JSON"),
        (
            "bare.jsonl",
            '{"prompt": "a star"}\n\n{"text": "a ring"}\n',
            "bare.jsonl, line 3: needs an object with a non-",
        ),
    ],
)
def test_bad_prompt_files(
    failing: Failing,
    write: Callable[..., Path],
    tmp_path: Path,
    which: str,
    name: str,
    content: str | None,
    expected: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert expected in failing("train", write(data={which: str(tmp_path / name)}))


def test_a_tag_that_no_prompt_has(failing: Failing, write: Callable[..., Path]) -> None:
    path = write(data={"tag_shares": {"colours": 1}})
    assert failing("train", path).startswith("data.tag_shares: no prompt has the tag 'colours'; tags of this set: col")


# --- models and rewards that cannot be had ----------------------------------------------------------------------------


def test_a_wrong_reward_or_prompt_shows_before_the_model_is_loaded(
    failing: Failing, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {"model_name": str(tmp_path / "no_model")}
    (tmp_path / "plain.txt").write_text("a photo of a star\n")
    plain = {"prompts": str(tmp_path / "plain.txt")}
    geneval = [{"reward_model": "Geneval", "detector": "shapes"}]
    video = [{"name": "clips", "reward_model": "tests.rewards.test_registry.NeedsVideo"}]
    assert "does not exist" not in failing("train", write(policy=nowhere, train={"group_size": 1}))
    assert "requires 'metadata', but 1 of 1 prompts" in failing(
        "train", write(policy=nowhere, data=plain, rewards=geneval)
    )
    assert "reward 'clips' requires 'video'" in failing("train", write(policy=nowhere, rewards=video))
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path))
    photos = {"prompts": "geneval", "eval_prompts": "geneval"}
    assert "the weights mask2former_swin-s" in failing("train", write(policy=nowhere, data=photos, rewards=["Geneval"]))
    assert "cannot find the class 'star'" in failing("train", write(policy=nowhere, rewards=["Geneval"]))
    for key in ("rewards", "eval_rewards"):
        assert "PickScore_v1 was not found" in failing("train", write(policy=nowhere, **{key: ["PickScore"]}))
    # an override by name takes the config's own entry, the drawn world's detector included
    named = failing("train", write(policy=nowhere, rewards=geneval), "--rewards", "[Geneval]")
    assert "no_model" in named and "detector" not in named


def test_metadata_that_a_reward_cannot_read_shows_before_the_model_is_loaded(
    failing: Failing, write: Callable[..., Path], tmp_path: Path
) -> None:
    line = {"prompt": "a photo of a star", "tag": "colours", "include": [{"class": "star", "count": 1}]}
    (tmp_path / "odd.jsonl").write_text(json.dumps(line) + "\n")
    odd = {"prompts": str(tmp_path / "odd.jsonl")}
    geneval = [{"reward_model": "Geneval", "detector": "shapes"}]
    text = failing("train", write(policy={"model_name": str(tmp_path / "no_model")}, data=odd, rewards=geneval))
    assert text.startswith("reward 'Geneval' cannot score the prompt 'a photo of a star' of ")
    assert "tag is 'colours'; it must be one of single_object" in text


def test_a_folder_without_a_model(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["train", str(write(policy={"model_name": str(tmp_path / "empty")}))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tiltflow train: policy.model_name={str(tmp_path / 'empty')!r}: could not be loaded")
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["evaluate", "--prompts", "shapes"], ["sample", "--prompt", "a photo of a star", "--output_dir", "out"]]
)
def test_a_checkpoint_that_is_none(failing: Failing, tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / "not_one"
    folder.mkdir()
    for path in (folder, tmp_path / "nowhere", folder / "file"):
        (folder / "file").write_text("x")
        text = failing(*command, "--checkpoint", path)
        assert text.startswith(f"{path} is not a tiltflow checkpoint: no manifest.json; expected a folder such as")


def test_a_damaged_checkpoint(failing: Failing, tmp_path: Path) -> None:
    folder = tmp_path / "epoch_000001"
    folder.mkdir()
    manifest = {"version": 1, "epoch": 1, "files": [{"path": "weights.safetensors", "size": 3, "sha256": "0" * 64}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "weights.safetensors" in failing("evaluate", "--checkpoint", folder)


@pytest.mark.parametrize("content", ["{}", "seed: 1\noutput_dir: x\n"])
def test_a_config_without_a_policy(failing: Failing, tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(AssertionError, match="key 'policy' is missing"):  # one line per missing key
        failing("train", path)


@pytest.mark.parametrize("command", [["evaluate"], ["sample", "--prompt", "a photo of a star"]])
def test_neither_or_both_of_checkpoint_and_model(failing: Failing, command: list[str]) -> None:
    assert failing(*command).startswith("give --checkpoint outputs/<run>/latest or --model_name")
    both = failing(*command, "--checkpoint", "a", "--model_name", "tiny_sd3")
    assert both.startswith("give --checkpoint or --model_name, not both")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "evaluate --model_name needs --prompts"),
        (["--prompts", "shapes"], "evaluate --model_name needs --rewards, for example --rewards '[Geneval]'"),
        (["--prompts", "shapes", "--rewards", "[Geneval"], "--rewards '[Geneval' is not a valid YAML value: line 1: "),
        (["--prompts", "shapes", "--rewards", "[{name: a}]"], "--rewards: an entry needs `reward_model`"),
        (
            ["--prompts", "shapes", "--rewards", "[{reward_model: Geneval, weight: x}]"],
            "--rewards: weight='x': Input should be a valid number",
        ),
        (["--prompts", "shapes", "--rewards", "Genevall"], "reward_model='Genevall' is not a built-in reward"),
        (
            ["--prompts", "ocr", "--rewards", "{reward_model: Geneval, detector: shapes}"],
            "reward 'Geneval' requires 'm",
        ),
        (
            ["--prompts", "shapes", "--rewards", "tests.rewards_for_tests.Rank", "--images_per_prompt", "1"],
            "evaluation.images_per_prompt=1: reward 'Rank' compares the images of a prompt with each other",
        ),
        (["--num_step", "3"], "--num_step is not a key of the config; nearest: evaluation.num_steps"),
        (["--num_steps", "0"], "--num_steps: evaluation.num_steps=0: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_evaluations(failing: Failing, random_sd3: Path, arguments: list[str], expected: str) -> None:
    assert failing("evaluate", "--model_name", random_sd3, *arguments).startswith(expected)


def test_no_images(failing: Failing, random_sd3: Path) -> None:
    text = failing("sample", "--model_name", random_sd3, "--prompt", "a star", "--count", "0")
    assert text == "--count 0: make at least 1 image per prompt"


# --- rewards that fail in the middle ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        ("NaNForFirst", "not finite: the reward is NaN or infinite"),
        ("OneShort", "length: returned "),
        ("Broken", "ValueError: the judge is out"),
    ],
)
def test_a_failing_reward_ends_the_run_and_leaves_nothing_half_written(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: str, cause: str
) -> None:
    entry = {"name": "mine", "reward_model": f"tests.rewards_for_tests.{reward}"}
    config = write(rewards=[entry], evaluation={"num_steps": 1, "max_prompts": 2})
    assert cli.main(["train", str(config)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().split("\n")
    assert line.startswith("tiltflow train: evaluation 'before': reward 'mine' failed on ")
    assert cause in line
    remedy = "set on_error: mask for this reward to leave such samples out instead"
    assert line.endswith(f"{remedy}; no epoch was finished before")
    run_dir = tmp_path / "out"
    left = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert left <= {"config.yaml", "metrics.jsonl"}
    assert load_run_config(str(run_dir / "config.yaml")) == load_run_config(str(config))
    assert not (run_dir / "latest").is_symlink()


def test_too_many_masked_failures_end_the_run(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"name": "mine", "reward_model": "tests.rewards_for_tests.AllNaN", "on_error": "mask"}
    small = {"train": {"num_prompts_per_epoch": 2}, "sampler": {"num_steps": 1}, "evaluation": {"max_prompts": 1}}
    assert cli.main(["train", str(write(rewards=[entry], **small))]) == 2
    warning, line = capsys.readouterr().err.strip().split("\n")
    assert warning.startswith("warning: evaluation 'before': reward 'mine' failed on ")
    assert "reward 'mine' failed on 100% of the epoch's samples, more than train.max_failure_fraction=50%" in line
    assert not list((tmp_path / "out").glob("*epoch_*"))
