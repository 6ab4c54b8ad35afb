"""An environment with only what a reward server needs, made as `examples/remote_reward` makes its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "remote_reward"


def make_environment(folder: Path) -> Path:
    """Make it in a folder, and return its interpreter."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "environment", f"PYTHON={sys.executable}", f"VENV={folder}"],
        env=environ,
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin" / "python"
