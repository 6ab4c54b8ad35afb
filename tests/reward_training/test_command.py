"""`tiltflow train-reward` from its config to its report, with a linear model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.invariant.runs import ROOT, environment, launch
from tiltflow import cli
from tiltflow.commands.reward_config import find_kind, load_reward_config
from tiltflow.runtime.tracking import read_jsonl

TYPE = "tests.reward_training.linear.LINEAR"


def write(folder: Path, **sections: Any) -> Path:
    """Write the config of a run into a folder; it goes to `<folder>/out`."""
    values: dict[str, Any] = {
        "seed": 3,
        "output_dir": str(folder / "out"),
        "model": {"reward_model_type": TYPE, "hidden": 6, "dropout": 0.2},
        "data": {"sets": ["near", "far"]},
        "train": {
            "max_epochs": 3,
            "micro_batch_size": 3,
            "validate_every": 0.5,
            "validate_at_start": True,
            "save_every": 4,
            "keep_best": {"metric": "validation_near/acc", "mode": "max", "count": 2},
        },
        "tracking": {"console": False},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(config: Path, *words: str) -> int:
    return cli.main(["train-reward", str(config), *words])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "time" and not k.endswith("seconds")}
        for row in read_jsonl(folder / "out" / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(write(folder)) == 0
    return folder


def test_a_run_leaves_checkpoints_the_best_models_and_a_report(finished: Path) -> None:
    out = finished / "out"
    found = rows(finished)
    assert [row["step"] for row in found] == list(range(19))
    assert [row["step"] for row in found if "validation_near/acc" in row] == [0, 3, 6, 9, 12, 15, 18]
    assert {"train/loss", "train/acc", "grad_norm", "lr", "samples", "epoch"} <= found[1].keys()
    assert "step_seconds" in read_jsonl(out / "metrics.jsonl")[1]
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "data.json", "report.html", "best", "model", "latest"),
        *("step_000016", "step_000018"),
    }
    ranked = sorted(
        ((-row["validation_near/acc"], row["step"]) for row in found if "validation_near/acc" in row), reverse=False
    )
    best = {path.name for path in (out / "best").iterdir()}
    assert best == {f"step_{step:06d}" for _, step in ranked[:2]}
    told = json.loads((out / "model" / "metrics.json").read_text())
    assert told["step"] == ranked[0][1] and told["metrics"]["validation_near/acc"] == -ranked[0][0]
    best_weights = load_file(out / "best" / f"step_{ranked[0][1]:06d}" / "model.safetensors")
    weights = load_file(out / "model" / "model.safetensors")
    assert all((weights[name] == value).all() for name, value in best_weights.items())


def test_the_report_shows_curves_the_best_models_and_what_was_left_out(finished: Path) -> None:
    page = (finished / "out" / "report.html").read_text()
    for word in (
        *("Step 18 of 18", "135 examples", "<h3>loss</h3>", "<h3>acc</h3>", "grad_norm", "validation_near, "),
        *("validation_far", "best/step_0000", "By validation_near/acc", "<td>45</td>", "<td>21</td>", "ties"),
        *("reward_model_type", "--paper"),
    ):
        assert word in page, word


def test_a_finished_run_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "out"
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".jsonl")]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.suffix != ".jsonl"}
    metrics = rows(finished)
    assert run(finished / "run.yaml") == 0
    assert "after step 18" in capsys.readouterr().err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert rows(finished) == metrics


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", "4"], "seed: 3 -> 4"),
        (["--hidden", "5"], "model.hidden: 6 -> 5"),
        (["--batch_size", "4"], "train.batch_size: 8 -> 4"),
        (["--data.count", "40"], "data.count: 45 -> 40"),
    ],
)
def test_another_run_is_not_continued(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert run(finished / "run.yaml", *words) == 2
    assert f"holds another run ({line})" in capsys.readouterr().err


def test_a_remedy_is_not_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    config = write(tmp_path)
    assert run(config, "--data.sets", "[near]", "--keep_best", "{metric: validation/acc, mode: max, count: 2}") == 0
    assert "goes on with another value: data.sets: ['near', 'far'] -> ['near']" in capsys.readouterr().err
    assert (
        run(
            config,
            "--data.count",
            "40",
            "--data.sets",
            "[near]",
            "--keep_best",
            "{metric: validation/acc, mode: max, count: 2}",
        )
        == 2
    )
    assert f"write the new place into {tmp_path / 'out' / 'config.yaml'} too" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["image_text", "binary_ranking", "regression"])
def test_validation_sets_are_no_part_of_what_a_run_is(kind: str) -> None:
    free = find_kind(kind).free
    assert "data.validation" in free and not {"data", "data.train"} & {*free}
    assert ("data.on_bad_image" in free) == (kind == "image_text")


def test_a_run_ended_by_time_goes_on_and_ends_like_one_that_never_stopped(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path)
    starts = 0
    while "step_000018" not in {path.name for path in (tmp_path / "out").glob("step_*")}:
        assert run(config, "--max_seconds", "0.000001") == 0
        starts += 1
        assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
        assert starts < 30
    assert starts == 18
    assert "goes on with another value" not in capsys.readouterr().err
    compare(finished, tmp_path, validations=False)


def compare(finished: Path, other: Path, *, validations: bool = True) -> None:
    """Check that two runs ended with the same bits."""
    for file in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / "out" / "latest" / file) for folder in (finished, other))
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    if validations:
        assert rows(other) == rows(finished)
        trees = [{path.name for path in (folder / "out" / "best").iterdir()} for folder in (finished, other)]
        assert trees[0] == trees[1]


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_never_stopped(finished: Path, tmp_path: Path) -> None:
    config = write(tmp_path)
    command = [sys.executable, "-m", "tiltflow", "train-reward", str(config)]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 6:
            break
        time.sleep(0.001)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run(config) == 0
    compare(finished, tmp_path)


@pytest.mark.slow
def test_two_processes_leave_the_same_folder(finished: Path, tmp_path: Path) -> None:
    config = write(tmp_path, model={"dropout": 0.0})
    (tmp_path / "one").mkdir()
    alone = write(tmp_path / "one", model={"dropout": 0.0})
    assert run(alone) == 0
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch([*launcher, "--num_machines", "1", "--mixed_precision", "no", "-m", "tiltflow", "train-reward", str(config)])
    for one, other in zip(rows(tmp_path), rows(tmp_path / "one"), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    trees = [
        {path.relative_to(folder / "out") for path in (folder / "out").rglob("*") if path.is_file()}
        for folder in (tmp_path, tmp_path / "one")
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("steps", [10, 18])
def test_models_measured_on_other_data_are_not_compared(tmp_path: Path, steps: int) -> None:
    config = write(tmp_path, train={"schedule": "constant"})
    out = tmp_path / "out"
    assert run(config, "--max_steps", "10") == 0
    former = {path.name for path in (out / "best").iterdir()}
    assert run(config, "--max_steps", str(steps), "--limit_validation_batches", "1") == 0
    if steps == 10:  # nothing is left to train, so nothing is measured anew
        assert {path.name for path in (out / "best").iterdir()} == former and not (out / "best.old").exists()
    else:
        assert {path.name for path in (out / "best.old").iterdir()} == former
        assert all(int(path.name[-6:]) > 10 for path in (out / "best").iterdir())
        assert json.loads((out / "model" / "metrics.json").read_text())["step"] > 10


def test_results_of_an_earlier_run_move_aside(tmp_path: Path) -> None:
    result = tmp_path / "out" / "evaluation" / "model-pairs.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    assert run(write(tmp_path), "--max_steps", "2") == 0
    assert not result.parent.exists() and (tmp_path / "out" / "evaluation.old" / result.name).is_file()


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("rewound", ["afresh", "step_000016"])
def test_the_model_is_of_the_steps_that_were_trained_last(tmp_path: Path, keep_best: bool, rewound: str) -> None:
    metric = {"metric": "validation_near/loss", "mode": "min"} if keep_best else None
    config = write(tmp_path, train={"keep_best": metric, "schedule": "constant"})
    out = tmp_path / "out"
    assert run(config) == 0
    first = load_file(out / "model" / "model.safetensors")
    (out / "latest").unlink()
    for checkpoint in out.glob("step_*"):
        if checkpoint.name != rewound:
            shutil.rmtree(checkpoint)
    assert run(config, "--train.lr", "0.02") == 0
    told = json.loads((out / "model" / "metrics.json").read_text())
    trained = load_file(out / "latest" / "weights.safetensors")
    model = load_file(out / "model" / "model.safetensors")
    if told["step"] == 18:  # the last step, trained anew
        assert all(torch.equal(model[name], value) for name, value in trained.items())
        assert not torch.equal(first["score.1.weight"], model["score.1.weight"])
    if not keep_best or rewound == "afresh":
        former = load_file(out / "model.old" / "model.safetensors")
        assert all(torch.equal(former[name], value) for name, value in first.items())
        assert told["step"] == 18


def test_a_new_run_keeps_the_model_that_a_kill_left_half_replaced(tmp_path: Path) -> None:
    config, out = write(tmp_path, train={"max_steps": 1}), tmp_path / "out"
    assert run(config) == 0
    first = (out / "model" / "model.safetensors").read_bytes()
    (out / "model").rename(out / ".model.former")  # as a kill between the two renames of its writing leaves it
    (out / "latest").unlink()
    for checkpoint in out.glob("step_*"):
        shutil.rmtree(checkpoint)
    assert run(config, "--train.lr", "0.02") == 0
    assert (out / "model.old" / "model.safetensors").read_bytes() == first
    assert (out / "model" / "model.safetensors").read_bytes() != first
    assert not (out / ".model.former").exists()


def test_notes_are_told_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(tmp_path), "--max_steps", "1") == 0
    assert "; ties: 3; longer than 5 tokens, truncated: 2; 6 steps an epoch" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What was left out or shortened" in page and "too_long" in page and "Nothing was" not in page


def test_without_keep_best_the_model_is_the_last(tmp_path: Path) -> None:
    config = write(tmp_path, data={"sets": []}, train={"keep_best": None, "validate_at_start": False})
    assert run(config, "--max_epochs", "1", "--save_every", "null") == 0
    out = tmp_path / "out"
    assert json.loads((out / "model" / "metrics.json").read_text())["step"] == 6
    assert [path.name for path in sorted(out.glob("step_*"))] == ["step_000006"]
    assert load_file(out / "model" / "model.safetensors")["score.3.weight"].shape == (1, 6)
    page = (out / "report.html").read_text()
    assert "keeps its last model alone" in page


def test_more_epochs_after_the_end_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, train={"max_epochs": 1})
    assert run(config) == 0
    assert run(config, "--max_epochs", "2") == 0
    assert "goes on with another value: train.max_epochs: 1 -> 2" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == list(range(13))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"keep_best": {"metric": "validation/acc"}}}, "such are: validation_near/loss, validation_far/loss"),
        (
            {"train": {"keep_best": {"metric": "validation_far/auc"}}},
            "'validation_far/auc' is not measured; legal: validation_far/acc, validation_far/loss, validation_near/acc",
        ),
        ({"data": {"count": 0}}, "holds no example"),
        ({"data": {"bad": 7}}, "example 7 cannot be read"),
        ({"train": {"warmup_steps": 100}}, "leave none of 18 steps"),
        ({"train": {"micro_batch": 100}}, "unknown key 'train.micro_batch'; did you mean 'train.micro_batch_size'?"),
        ({"model": {"reward_model_type": "binary_rankin"}}, "did you mean 'binary_ranking'? legal: binary_ranking, im"),
        ({"model": {"reward_model_type": "no_module.KIND"}}, "no_module cannot be imported: ModuleNotFoundError"),
        ({"model": {"reward_model_type": f"{TYPE}S"}}, "LINEARS in tests.reward_training.linear does not exist; legal"),
        ({"model": {"reward_model_type": "tests.reward_training.linear.NOT_A_KIND"}}, "is no RewardModelKind; legal"),
        ({"model": {"reward_model_type": None}}, "reward_model_type=None: it says what is trained; legal: binary_rank"),
    ],
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], words: str
) -> None:
    assert run(write(tmp_path, **sections)) == 2
    error = capsys.readouterr().err
    assert error.startswith("tiltflow train-reward: ") or "; 18 in all" in error or "training examples" in error
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize("names", [["loss", "acc"], []])
def test_a_metric_that_is_not_measured_costs_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    best = {"keep_best": {"metric": "validation_near/auc"}, "validate_at_start": False}
    assert run(write(tmp_path, model={"names": names}, train=best)) == 2
    assert "'validation_near/auc' is not measured; legal: validation_far/acc" in capsys.readouterr().err
    if names:  # known before the first step
        assert not (tmp_path / "out").exists()
        return
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "out" / "latest").resolve().name == "step_000003"
    best["keep_best"] = {"metric": "validation_near/acc", "mode": "max"}
    assert run(write(tmp_path, model={"names": names}, train=best)) == 0
    assert len(rows(tmp_path)) == 18


def test_a_config_of_another_command_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    for wrong in ("train", "pretrain"):
        assert cli.main([wrong, str(config)]) == 2
        assert f"is a config for training a reward model; use it with: tiltflow train-reward {config}" in (
            capsys.readouterr().err
        )
    for packaged, right in (("shapes_ram", "train"), ("tiny_sd3", "pretrain")):
        assert cli.main(["train-reward", packaged]) == 2
        assert f"use it with: tiltflow {right} {packaged}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evaluate"], ["sample", "--prompt", "a star"]])
def test_a_reward_model_makes_no_images(finished: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = finished / "out" / "latest"
    assert cli.main([*words, "--checkpoint", str(checkpoint)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"tiltflow {words[0]}: {checkpoint} is of a reward model, which makes no images; measure it with: "
        f"tiltflow evaluate-reward {finished / 'out' / 'model'} DATA"
    )


def test_print_config_and_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    assert run(config, "--print-config", "--train.lr", "1e-3", "--hidden=2", "--validate_every", "0.25") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["train"]["lr"], printed["model"]["hidden"], printed["train"]["validate_every"]) == (1e-3, 2, 0.25)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(printed))
    kind, again = load_reward_config(str(tmp_path / "again.yaml"))
    assert again.model_dump(mode="json") == printed and kind.config is type(again)


def test_the_type_can_be_overridden_and_the_folder_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"model": {"reward_model_type": "regression"}}))
    _, config = load_reward_config(str(tmp_path / "small.yaml"), [("reward_model_type", TYPE)])
    assert (config.output_dir, config.model.reward_model_type) == ("outputs/small", TYPE)
