"""Whole commands in-process on a tiny random model: what a run leaves, and what the other commands make of it."""

import errno
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from tests.tiny import run_values
from tiltflow import cli
from tiltflow.commands.build import find_policy, run_folder
from tiltflow.config import RunConfig, load_run_config, run_config
from tiltflow.evaluation import EvaluationResult
from tiltflow.policies.sd3 import SD3Policy
from tiltflow.runtime import checkpoint as checkpoint_module
from tiltflow.runtime.checkpoint import load_tensors
from tiltflow.runtime.tracking import read_jsonl

GENEVAL = [{"name": "geneval", "reward_model": "Geneval", "detector": "shapes"}]
Run = tuple[Path, RunConfig]


def start(model: Path, folder: Path, **sections: Any) -> Run:
    """Train to the end through the command line, in steps that show; return the run's folder and config."""
    values = run_values(model, folder / "out", train={"epochs": 2, "lr": 0.05}, **sections)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(path)]) == 0
    return folder / "out", run_config(values, source="test")


def size_of(path: str | Path) -> tuple[int, int]:
    """Return width and height of an image file."""
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def lora_run(random_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a finished LoRA run, judged by GenEval on the side, its text encoders unloaded."""
    return start(
        random_sd3,
        tmp_path_factory.mktemp("lora"),
        policy={"unload_text_encoders": True},
        eval_rewards=[*GENEVAL, {"name": "brightness", "reward_model": "tests.rewards_for_tests.Brightness"}],
        data={"tag_shares": {"colors": 1, "single_object": 2}},
    )


@pytest.fixture(scope="module")
def full_run(random_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a finished run of full fine-tuning."""
    return start(random_sd3, tmp_path_factory.mktemp("full"), policy={"finetune": "full"})


# --- train ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_config_metrics_evaluations_and_a_report(lora_run: Run) -> None:
    run_dir, config = lora_run
    assert run_config(yaml.safe_load((run_dir / "config.yaml").read_text()), source="copy") == config
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [(row["step"], "loss" in row, "eval/geneval_strict" in row) for row in rows] == [
        (0, False, True),
        (1, True, False),
        (2, True, False),
        (2, False, True),
    ]
    assert {"drift", "grad_norm", "reward/brightness/mean", "seconds/rollout", "failures/brightness"} <= rows[1].keys()
    results = [EvaluationResult.load(run_dir / "evaluations" / f"{name}.json") for name in ("before", "after")]
    assert [result.settings["epoch"] for result in results] == [0, 2]
    assert [len(result.rows) for result in results] == [6, 6]
    before, after = ([row.scores["brightness"] for row in result.rows] for result in results)
    changes = [abs(old - new) for old, new in zip(before, after, strict=True)]  # same noise, moved weights
    assert min(changes) > 0 and max(changes) > 1e-3
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # two kept images, before and after
    for word in (
        "Reward: brightness",
        "Drift from the reference",
        "<h2>Time</h2>",
        "reward_multiplier",
        "geneval_strict",
    ):
        assert word in page


def test_evaluation_during_training(random_sd3: Path, tmp_path: Path) -> None:
    values = run_values(random_sd3, tmp_path / "out", train={"epochs": 3, "evaluate_every": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    names = {path.stem for path in (tmp_path / "out" / "evaluations").glob("*.json")}
    assert names == {"before", "epoch_000001", "epoch_000002", "after"}
    rows = [row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "eval/brightness" in row]
    assert rows == [0, 1, 2, 3]


def test_a_lora_checkpoint_loads_in_the_stock_pipeline(lora_run: Run) -> None:
    run_dir, config = lora_run
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(config.policy.model_name)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 1, "output_type": "np"}

    def draw() -> torch.Tensor:
        return torch.from_numpy(pipe("a ring", generator=torch.Generator().manual_seed(0), **options).images)

    base = draw()
    pipe.load_lora_weights(str(run_dir / "latest"))
    assert (draw() - base).abs().max() > 1e-6
    ema = {name: value for name, value in load_tensors(run_dir / "latest" / "weights.safetensors").items()}
    loaded = dict(pipe.transformer.named_parameters())
    for name, value in ema.items():
        kind, _, parameter = name.partition(".")
        if kind == "ema":
            stock = parameter.replace(".default.", ".default_0.")
            torch.testing.assert_close(loaded[stock].detach(), value, rtol=0, atol=0)


def test_a_full_checkpoint_is_a_stock_pipeline(full_run: Run) -> None:
    run_dir, _ = full_run
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(run_dir / "latest")
    tensors = load_tensors(run_dir / "latest" / "weights.safetensors")
    for name, value in pipe.transformer.state_dict().items():
        if f"ema.{name}" in tensors:
            torch.testing.assert_close(value, tensors[f"ema.{name}"], rtol=0, atol=0)
    assert sum(name.startswith("ema.") for name in tensors) == len(list(pipe.transformer.parameters()))


def test_a_finished_run_is_left_alone(full_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = full_run
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.json")}
    rows = (run_dir / "metrics.jsonl").read_text()
    assert cli.main(["train", str(run_dir.parent / "run.yaml")]) == 0
    assert "after epoch 2" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.json")} == before
    assert (run_dir / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (["--seed", "8"], "seed: 7 -> 8"),
        (["--finetune", "lora"], "policy.finetune: 'full' -> 'lora'"),
        (["--data.prompts", "FILE"], "data.prompts: 'shapes' -> 'FILE'"),
    ],
)
def test_another_run_is_not_continued(
    full_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: list[str], line: str
) -> None:
    run_dir, _ = full_run
    file = str(tmp_path / "prompts.txt")
    Path(file).write_text("a photo of a ring\n")
    words = [word.replace("FILE", file) for word in override]
    assert cli.main(["train", str(run_dir.parent / "run.yaml"), *words]) == 2
    assert f"{run_dir} holds another run ({line.replace('FILE', file)})" in capsys.readouterr().err


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values(random_sd3, tmp_path / "out", train={"epochs": 2})))
    seal = checkpoint_module._seal

    def full(folder: Path, epoch: int) -> None:
        if epoch == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "weights.safetensors"))
        seal(folder, epoch)

    monkeypatch.setattr(checkpoint_module, "_seal", full)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("tiltflow train: cannot write checkpoint epoch_000002")
    assert "No space left on device" in line and "Free some space" in line
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if "epoch" in path.name)
    assert folders == ["epoch_000001"]
    assert (tmp_path / "out" / "latest").resolve().name == "epoch_000001"
    monkeypatch.setattr(checkpoint_module, "_seal", seal)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert "after epoch 1" in capsys.readouterr().err


def test_a_folder_where_the_link_belongs(random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "latest").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values(random_sd3, tmp_path / "out", train={"epochs": 1})))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "latest is a folder or file where a link to the newest checkpoint belongs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sections",
    [
        {"eval_rewards": [{"reward_model": "tests.rewards_for_tests.CannotBeBuilt"}]},
        {"tracking": {"trackio_project": "x", "console": False}},
    ],
)
def test_what_cannot_be_built_leaves_a_finished_run_as_it_was(
    full_run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    run_dir, _ = full_run
    monkeypatch.setitem(sys.modules, "trackio", None)
    values = yaml.safe_load((run_dir.parent / "run.yaml").read_text())
    path = run_dir.parent / "other.yaml"
    path.write_text(yaml.safe_dump({**values, **sections}))
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    assert cli.main(["train", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


class Stop(Exception):
    """A kill at a chosen moment."""


def test_an_evaluation_lost_to_a_kill_is_made_up_for(
    random_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the checkpoint of an epoch and its evaluation, and once more before the next checkpoint."""
    values = run_values(random_sd3, tmp_path / "out", train={"epochs": 6, "evaluate_every": 1, "save_every": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    save = EvaluationResult.save
    for moment in ("epoch_000002", "epoch_000003"):

        def killed(self: EvaluationResult, directory: Path, moment: str = moment) -> Path:
            path = save(self, directory) if moment == "epoch_000003" else directory
            if self.name == moment:
                raise Stop
            return path if moment == "epoch_000003" else save(self, directory)

        monkeypatch.setattr(EvaluationResult, "save", killed)
        with pytest.raises(Stop):
            cli.main(["train", str(tmp_path / "run.yaml")])
    monkeypatch.setattr(EvaluationResult, "save", save)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    steps = [row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "eval/brightness" in row]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "loss" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize("moment", ["epoch_000002", "after"])
def test_an_evaluation_that_was_saved_and_not_told_is_told_later(
    random_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    values = run_values(random_sd3, tmp_path / "out", train={"epochs": 3, "evaluate_every": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    save = EvaluationResult.save

    def killed(self: EvaluationResult, directory: Path) -> Path:
        path = save(self, directory)
        if self.name == moment:
            raise Stop
        return path

    monkeypatch.setattr(EvaluationResult, "save", killed)
    with pytest.raises(Stop):
        cli.main(["train", str(tmp_path / "run.yaml")])
    monkeypatch.setattr(EvaluationResult, "save", save)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    steps = [row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "eval/brightness" in row]
    assert steps == [0, 1, 2, 3]


def test_results_of_weights_that_are_given_up_are_forgotten(
    random_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the evaluation of epoch 3, its checkpoint at 2, and resumed with another learning rate."""
    train = {"epochs": 4, "evaluate_every": 1, "save_every": 2, "lr": 0.01}

    def write(folder: str, lr: float) -> Path:
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump(run_values(random_sd3, tmp_path / folder, train={**train, "lr": lr})))
        return path

    save = EvaluationResult.save

    def killed(self: EvaluationResult, directory: Path) -> Path:
        path = save(self, directory)
        if self.name == "epoch_000003":
            raise Stop
        return path

    monkeypatch.setattr(EvaluationResult, "save", killed)
    with pytest.raises(Stop):
        cli.main(["train", str(write("out", 0.01))])
    monkeypatch.setattr(EvaluationResult, "save", save)
    old = EvaluationResult.load(tmp_path / "out" / "evaluations" / "epoch_000003.json")
    for path in (tmp_path / "out" / "evaluations" / "before").glob("*.png"):
        path.unlink()  # pictures that people threw away are missed by nobody
    assert cli.main(["train", str(write("out", 0.2))]) == 0
    new = EvaluationResult.load(tmp_path / "out" / "evaluations" / "epoch_000003.json")
    assert [row.scores for row in new.rows] != [row.scores for row in old.rows]


def test_a_reward_that_fails_late_in_an_evaluation_leaves_nothing(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = "[{reward_model: tests.rewards_for_tests.BreaksLater, batch_size: 2}]"
    command = ["evaluate", "--model_name", str(random_sd3), "--prompts", "shapes", "--rewards", entry]
    few = ["--max_prompts", "8", "--images_per_prompt", "1", "--evaluation.batch_size", "1", "--num_steps", "1"]
    output = ["--max_sequence_length", "1", "--output_dir", str(tmp_path / "results")]
    assert cli.main([*command, *few, *output]) == 2
    assert "the judge went home" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


IN_THE_ROLLOUT = {"reward_model": "tests.rewards_for_tests.BreaksAfterFour", "async_reward": True, "batch_size": 2}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"on_error": "mask"}, "failed on 100% of the epoch's samples"),
        ({"on_error": "raise"}, "the judge went home"),
        (IN_THE_ROLLOUT, "the judge went home"),
        ({**IN_THE_ROLLOUT, "on_error": "mask"}, "failed on 100% of the epoch's samples"),
    ],
    ids=["mask", "raise", "async raise", "async mask"],
)
def test_a_run_whose_rewards_fail_keeps_what_it_learnt(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: dict[str, Any], message: str
) -> None:
    """The reward fails from the second epoch of each process on; checkpoints are due much later."""
    values = run_values(
        random_sd3,
        tmp_path / "out",
        train={"epochs": 6, "save_every": 50},
        rewards=[{"name": "mine", "reward_model": "tests.rewards_for_tests.BreaksLater", **reward}],
        eval_rewards=[{"name": "other", "reward_model": "tests.rewards_for_tests.Brightness"}],
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for epoch in (1, 2):
        assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert message in told and "checkpoint" not in told
        assert told.endswith(f"; the weights after epoch {epoch} are saved in {tmp_path / 'out'}")
        assert (tmp_path / "out" / "latest").resolve().name == f"epoch_{epoch:06d}"


def test_a_run_whose_evaluation_fails_keeps_what_it_learnt(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out reward fails in the second evaluation of each process; checkpoints are due much later."""
    values = run_values(
        random_sd3,
        tmp_path / "out",
        train={"epochs": 6, "save_every": 50, "evaluate_every": 2},
        eval_rewards=[{"name": "other", "reward_model": "tests.rewards_for_tests.BreaksLater"}],
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for epoch in (2, 4):
        assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"evaluation 'epoch_{epoch:06d}': reward 'other' failed" in told and "the judge went home" in told
        assert told.endswith(f"; the weights after epoch {epoch} are saved in {tmp_path / 'out'}")
        assert (tmp_path / "out" / "latest").resolve().name == f"epoch_{epoch:06d}"


def test_a_run_whose_rewards_fail_at_once_claims_no_checkpoint(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = [{"name": "mine", "reward_model": "tests.rewards_for_tests.AllNaN", "on_error": "mask"}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values(random_sd3, tmp_path / "out", rewards=reward)))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("mend the reward and run again; no epoch was finished before")
    assert list((tmp_path / "out").glob("epoch_*")) == []


def test_what_a_judge_that_was_away_did_not_score_is_told_and_measured_again(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "away"
    away.touch()
    monkeypatch.setenv("TILTFLOW_TEST_AWAY", str(away))
    judge = {"name": "judge", "reward_model": "tests.rewards_for_tests.AwayWhile", "on_error": "mask"}
    held = {"name": "held", "reward_model": "tests.rewards_for_tests.Brightness"}
    values = run_values(random_sd3, tmp_path / "out", train={"epochs": 2, "evaluate_every": 1})
    path, folder = tmp_path / "run.yaml", tmp_path / "out" / "evaluations"
    path.write_text(yaml.safe_dump({**values, "eval_rewards": [judge, held]}))

    def train() -> tuple[str, dict[str, EvaluationResult]]:
        assert cli.main(["train", str(path)]) == 0
        names = ("before", "epoch_000001", "after")
        return capsys.readouterr().err, {name: EvaluationResult.load(folder / f"{name}.json") for name in names}

    told, first = train()
    for name, result in first.items():
        assert result.without_score() == ["judge"]
        line = "reward 'judge' failed on 6 of 6 images; first reason: ConnectionError: nobody answers"
        assert f"warning: evaluation '{name}': {line} (at rewards_for_tests.py:" in told
    away.unlink()
    told, second = train()
    assert "failed on" not in told
    assert [result.without_score() for result in second.values()] == [[], ["judge"], []]  # those weights are gone
    for name in ("before", "after"):
        scores = [row.scores for row in second[name].rows]
        assert [row["held"] for row in scores] == [row.scores["held"] for row in first[name].rows]
        assert all(row["judge"] is not None for row in scores)
    rows = [row for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "eval/judge" in row]
    assert [(row["step"], row["eval/judge"] is not None) for row in rows][-2:] == [(0, True), (2, True)]
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    train()
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.json")} == stamps


# --- evaluate ---------------------------------------------------------------------------------------------------------


def results_of(output: str) -> dict[str, float]:
    """Return the `RESULT` lines of a command, after which it may only warn of few prompts and say where they went."""
    *lines, last = output.strip().split("\n")
    assert last.startswith("result: ") and Path(last.removeprefix("result: ")).is_file()
    lines = [line for line in lines if not line.startswith("Few prompts (")]
    pairs = [re.fullmatch(r"RESULT (\w+)=(\S+)", line) for line in lines]
    assert all(pairs), lines
    return {pair[1]: float(pair[2]) for pair in pairs if pair}


def test_evaluate_a_checkpoint_with_the_config_found_beside_it(
    lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = lora_run
    command = ["evaluate", "--checkpoint", str(run_dir / "latest"), "--output_dir", str(tmp_path)]
    assert cli.main(command) == 0
    printed = results_of(capsys.readouterr().out)
    after = EvaluationResult.load(run_dir / "evaluations" / "after.json")
    assert printed["geneval_strict"] == pytest.approx(after.summary["geneval_strict"].value, abs=1e-5)
    assert {"geneval_correct_counting", "geneval_strict_low", "geneval_partial"} <= printed.keys()
    found = EvaluationResult.load(tmp_path / "epoch_000002.json")
    assert [row.scores for row in found.rows] == [row.scores for row in after.rows]
    assert len({row.scores["brightness"] for row in found.rows}) == len(found.rows)
    assert (found.settings["prompt_source"], found.settings["rewards"][0]["reward_model"]) == ("shapes", "Geneval")
    assert len(list((tmp_path / "epoch_000002").glob("*.png"))) == 2


def test_evaluate_finds_a_reward_by_name_and_takes_overrides(
    lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = lora_run
    command = ["evaluate", "--checkpoint", str(run_dir / "latest"), "--output_dir", str(tmp_path)]
    options = ["--rewards", "[Geneval, brightness]", "--evaluation.max_prompts", "2", "--images_per_prompt=2"]
    assert cli.main([*command, *options]) == 0
    assert {"geneval_strict", "brightness"} <= results_of(capsys.readouterr().out).keys()
    assert len(EvaluationResult.load(tmp_path / "epoch_000002.json").rows) == 4


def test_evaluate_checks_every_option_before_it_builds_anything(
    lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = lora_run
    rewards = "[tests.rewards_for_tests.CannotBeBuilt, {reward_model: Geneval, detector: shapes, scor: strict}]"
    command = ["evaluate", "--checkpoint", str(run_dir / "latest"), "--output_dir", str(tmp_path)]
    assert cli.main([*command, "--rewards", rewards]) == 2
    told = capsys.readouterr().err
    assert "reward 'Geneval': unknown key 'scor'; did you mean 'score'?" in told and "no room" not in told


def test_a_checkpoint_is_evaluated_without_the_rewards_it_was_trained_on(
    full_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = full_run
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "latest").symlink_to((run_dir / "latest").resolve())
    content = (run_dir / "config.yaml").read_text().replace("tests.rewards_for_tests", "no_such_module")
    (copy / "config.yaml").write_text(content)
    options = ["--checkpoint", str(copy / "latest"), "--output_dir", str(tmp_path / "results")]
    geneval = "[{reward_model: Geneval, detector: shapes}]"
    assert cli.main(["evaluate", *options, "--max_prompts", "1", "--rewards", geneval]) == 0
    assert "geneval_strict" in results_of(capsys.readouterr().out)
    assert cli.main(["sample", *options, "--prompt", "a ring", "--count", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", *options]) == 2
    assert "no_such_module" in capsys.readouterr().err


def test_a_checkpoint_may_be_the_working_folder(full_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, _ = full_run
    monkeypatch.chdir(run_dir / "latest")
    values, found = find_policy(Path("."), None)
    assert found == load_run_config(str(run_dir / "config.yaml")) and values == found.policy.model_dump(mode="json")
    assert run_folder(Path(".")).samefile(run_dir)  # where the results go, too


def test_a_copied_checkpoint_tells_what_else_to_copy(
    full_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copy").symlink_to((full_run[0] / "latest").resolve())
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "copy"), "--prompt", "a star"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"expected {tmp_path / 'config.yaml'}: copy the run's config.yaml there\n")


def test_evaluate_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--model_name", "tiny_sd3", "--prompts", "shapes", "--rewards", "[Geneval]"]
    few = ["--max_prompts", "6", "--images_per_prompt", "1", "--num_steps", "2", "--output_dir", str(tmp_path)]
    assert cli.main([*command, *few]) == 0
    printed = results_of(capsys.readouterr().out)
    tags = [printed[f"geneval_correct_{tag}"] for tag in ("single_object", "two_object", "counting")]
    assert all(0 <= value <= 1 for value in tags)
    content = json.loads((tmp_path / "tiny_sd3.json").read_text())
    assert {row["info"]["Geneval"]["tag"] for row in content["rows"]} >= {"colors", "position", "color_attr"}


def test_a_local_model_folder_has_its_own_size(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model_name", str(random_sd3), "--prompt", "a ring", "--count", "1"]
    few = ["--num_steps", "1", "--max_sequence_length", "1", "--output_dir", str(tmp_path)]
    assert cli.main([*command, *few]) == 0
    assert size_of(capsys.readouterr().out.split()[1]) == (32, 32)
    assert cli.main([*command, *few, "--width", "16", "--precision", "fp32"]) == 0
    assert size_of(capsys.readouterr().out.split()[1]) == (16, 32)


def test_evaluate_with_a_reward_that_scores_nothing_fails_and_says_why(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = "[{reward_model: tests.rewards_for_tests.Broken, on_error: mask}, tests.rewards_for_tests.Brightness]"
    command = ["evaluate", "--model_name", str(random_sd3), "--prompts", "shapes", "--rewards", entries]
    few = ["--max_prompts", "2", "--images_per_prompt", "1", "--num_steps", "1", "--max_sequence_length", "1"]
    assert cli.main([*command, *few, "--output_dir", str(tmp_path)]) == 1
    told = capsys.readouterr()
    line = "reward 'Broken' failed on 2 of 2 images; first reason: ValueError: the judge is out"
    assert f"warning: {line} (at rewards_for_tests.py:" in told.err
    assert results_of(told.out)["brightness"] > 0
    assert len(list(tmp_path.glob("*.json"))) == 1


# --- sample -----------------------------------------------------------------------------------------------------------


def test_sample_writes_a_grid_and_singles(lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = lora_run
    prompts = ["--prompt", "a photo of a ring", "--prompt", "a photo of two stars"]
    command = ["sample", "--checkpoint", str(run_dir / "latest"), *prompts, "--count", "3", "--seed", "5"]
    assert cli.main([*command, "--output_dir", str(tmp_path / "a")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    singles = [f"{p:03d}_{i:02d}.png" for p in (0, 1) for i in range(3)]
    assert [path.name for path in files] == ["grid.png", *singles, "samples.jsonl"]
    assert size_of(files[1]) == (32, 32)
    width, height = size_of(files[0])
    assert width >= 3 * 32 and height >= 2 * 32
    assert cli.main([*command, "--output_dir", str(tmp_path / "b"), "--num_steps", "2"]) == 0
    again = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    assert len({path.read_bytes() for path in files}) == len(files)
    model = ["--model_name", str(lora_run[1].policy.model_name), "--max_sequence_length", "1", "--precision", "fp32"]
    base = ["sample", *model, *command[3:], "--num_steps", "2", "--guidance_scale", "2", "--batch_size", "16"]
    assert cli.main([*base, "--output_dir", str(tmp_path / "base")]) == 0
    untrained = [Path(line) for line in capsys.readouterr().out.split()]
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(files[:-1], untrained[:-1], strict=True))


def test_what_was_sampled_can_be_scored(random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The grid is no sample, every image has its prompt, and nothing of an earlier call stays."""
    out, model = str(tmp_path / "out"), ["--model_name", str(random_sd3), "--max_sequence_length", "1"]
    command = ["sample", *model, "--num_steps", "1", "--output_dir", out]
    (tmp_path / "out").mkdir()
    own = tmp_path / "out" / "mine.png"
    own.write_bytes(b"not of this command")
    assert cli.main([*command, "--prompt", "a star", "--prompt", "a ring", "--count", "3"]) == 0
    assert cli.main([*command, "--prompt", 'a ring\u2028"twice"', "--prompt", "a cube", "--count", "2"]) == 0
    assert sorted(path.name for path in Path(out).glob("*.png")) == [*SAMPLED, own.name]
    assert own.read_bytes() == b"not of this command"
    own.unlink()
    brightness = ["score", "--rewards", "tests.rewards_for_tests.Brightness", "--output", str(tmp_path / "rows.jsonl")]
    capsys.readouterr()
    assert cli.main([*brightness, "--images", f"{out}/samples.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["Brightness", "4"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().split("\n") if line]
    assert [row["prompt"] for row in rows] == ['a ring\u2028"twice"'] * 2 + ["a cube"] * 2
    assert [path.name for path in map(Path, (row["image"] for row in rows))] == SAMPLED
    assert cli.main([*brightness, "--images", out, "--prompts", f"{out}/samples.jsonl"]) == 0


SAMPLED = ["000_00.png", "000_01.png", "001_00.png", "001_01.png"]


def test_a_list_that_is_not_of_samples_is_left_alone(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.jsonl").write_text("my notes")
    command = ["sample", "--model_name", str(random_sd3), "--prompt", "a ring", "--output_dir", str(tmp_path)]
    assert cli.main(command) == 2
    assert "samples.jsonl is no list of samples" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_a_key_of_another_section_is_none_of_the_commands(
    command: str, random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prompts", "shapes", "--rewards", "[Geneval]"] if command == "evaluate" else ["--prompt", "a ring"]
    options = ["--model_name", str(random_sd3), "--output_dir", str(tmp_path / "out"), "--train.num_steps", "2"]
    assert cli.main([command, *more, *options]) == 2
    assert capsys.readouterr().err.startswith(f"tiltflow {command}: --train.num_steps is not a key of the config")
    assert not (tmp_path / "out").exists()


# --- prompts are embedded once ----------------------------------------------------------------------------------------


def test_a_run_encodes_each_prompt_once(random_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode: Callable[..., Any] = SD3Policy.encode

    def counting(self: SD3Policy, prompts: list[str]) -> Any:
        seen.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(SD3Policy, "encode", counting)
    (tmp_path / "prompts.txt").write_text("a photo of a ring\na photo of a star\na photo of a cross\n")
    file = str(tmp_path / "prompts.txt")
    start(random_sd3, tmp_path, data={"prompts": file, "eval_prompts": file})
    assert sorted(seen) == ["", "a photo of a cross", "a photo of a ring", "a photo of a star"]
