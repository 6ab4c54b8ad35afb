"""Ctrl+C ends a command with one line and status 130, and the same command goes on from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tiltflow import cli, commands

ROOT = Path(__file__).resolve().parents[1]
REWARD = """
import os
import signal
from pathlib import Path

import torch

from tiltflow.rewards import PointwiseRewardModel, RewardModelOutput


class Interrupts(PointwiseRewardModel):
    required_fields = ("image",)

    def __call__(self, prompt=None, image=None, **media):
        calls = Path("calls")
        calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
        if len(calls.read_text()) == 66:
            os.kill(os.getpid(), signal.SIGINT)
        return RewardModelOutput(torch.zeros(len(image)))
"""


def test_score_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "interrupts.py").write_text(REWARD)
    (tmp_path / "images").mkdir()
    for index in range(70):  # more than the 64 whose rows are kept at once
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    words = ["score", "--rewards", "interrupts.Interrupts", "--images", "images", "--batch_size", "1"]

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "tiltflow", *words, "--output", "scores.jsonl"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    done = run()
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "scores.jsonl").exists()
    assert done.stderr.endswith("\ntiltflow score: interrupted; run the same command again to go on\n")
    done = run()
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 70
    assert len((tmp_path / "calls").read_text()) == 66 + 6  # the first 64 were not scored again


@pytest.mark.parametrize(
    ("words", "name", "goes_on"),
    [
        (["train", "shapes_ram"], "run_training", True),
        (["train-reward", "shapes_preference"], "run_reward_training", True),
        (["pretrain", "tiny_sd3"], "run_pretraining", True),
        (["sample", "--prompt", "a star"], "run_sampling", False),
    ],
)
def test_only_commands_that_go_on_say_so(
    words: list[str], name: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, name, interrupted)
    assert cli.main(words) == 130
    again = "; run the same command again to go on" if goes_on else ""
    assert capsys.readouterr().err == f"\ntiltflow {words[0]}: interrupted{again}\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(words) == 130
    assert capsys.readouterr().err == ""
