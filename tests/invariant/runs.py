"""Runs of the real command line in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import run_values
from tiltflow.runtime.checkpoint import load_tensors

ROOT = Path(__file__).resolve().parents[2]


def write_config(path: Path, model: Path, output_dir: Path, **sections: dict[str, Any]) -> Path:
    """Write the config of a seconds-long run."""
    path.write_text(yaml.safe_dump(run_values(model, output_dir, **sections)))
    return path


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a run: this checkout importable, one thread, no network."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def launch(command: Sequence[str | Path], **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its good end and return what it printed."""
    finished = subprocess.run(
        command, env=environment(**extra), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def train(config: Path, *, launcher: tuple[str, ...] = (sys.executable, "-m", "tiltflow"), **extra: str) -> str:
    """Run `tiltflow train` to its end and return what it printed."""
    finished = launch([*launcher, "train", config], **extra)
    return finished.stdout + finished.stderr


def final_weights(output_dir: Path) -> dict[str, Any]:
    """Return theta, `old` and `ema` of a run's last checkpoint."""
    return load_tensors(output_dir / "latest" / "weights.safetensors")
