"""`examples/remote_reward` from its two commands to its metrics."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.invariant.runs import environment
from tests.isolated import EXAMPLE, ROOT
from tests.serving.http.servers import running

SMALL = {
    "train.epochs": 2,
    "train.num_prompts_per_epoch": 4,
    "train.group_size": 4,
    "sampler.batch_size": 8,
    "sampler.num_steps": 2,
    "evaluation.num_steps": 2,
    "evaluation.max_prompts": 3,
}


def train(output_dir: Path, **reward: Any) -> list[dict[str, Any]]:
    """Run the example's training, smaller, with keys of its reward replaced, and return the rows of its metrics."""
    (entry,) = yaml.safe_load((EXAMPLE / "train.yaml").read_text())["rewards"]
    changed = {key: value for key, value in {**entry, **reward}.items() if value is not None}
    overrides = {**SMALL, "output_dir": output_dir, "rewards": json.dumps([changed])}
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "tiltflow", "train", "examples/remote_reward/train.yaml", *words],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def rewards_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = ("reward/", "eval/", "failures/", "loss")
    return [{key: value for key, value in row.items() if key.startswith(wanted)} for row in rows]


@pytest.mark.slow
def test_the_rewards_of_the_run_are_those_of_the_server(isolated_python: Path, tmp_path: Path) -> None:
    words = (str(EXAMPLE / "server.py"), "--port", "0")
    with running(*words, python=isolated_python, PYTHONPATH="") as server:
        rows = train(tmp_path / "far", server_url=f"http://127.0.0.1:{server.port}")
    near = train(tmp_path / "near", reward_model="tests.examples.rewards.ColourShare", server_url=None)
    assert rewards_of(rows) == rewards_of(near)
    epochs = [row for row in rows if "loss" in row]
    assert [row["failures/colour"] for row in epochs] == [0, 0]
    assert all(0 < row["reward/colour/mean"] < 1 and row["reward/colour/std"] > 0 for row in epochs)
    assert len([row for row in rows if "eval/colour" in row]) == 2


def test_the_page_of_servers_names_the_same_packages() -> None:
    names = (EXAMPLE / "requirements.txt").read_text().split()
    assert f"pip install {' '.join(names)} " in (ROOT / "docs" / "serving.md").read_text()
