"""A run whose reward server is killed and started again midway ends with the weights of a run whose server lived."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.invariant.runs import ROOT, environment, final_weights, train, write_config
from tests.serving.http.servers import running
from tests.sockets import dead_port

SERVER = Path(__file__).with_name("outage_server.py")
EPOCHS, PER_EPOCH, AT_THE_START = 3, 8, 6  # samples per epoch, and of the evaluation before training
OUTAGE = 1.5  # seconds


def config(folder: Path, name: str, model: Path, port: int) -> Path:
    reward = {
        "name": "far",
        "reward_model": "RemotePointwiseRewardModel",
        "server_url": f"http://127.0.0.1:{port}",
        "batch_size": 1,
        "async_reward": True,
        "num_workers": 2,
        "timeout": 60,
        "retry_attempts": 3,
    }
    options = {"rewards": [reward], "train": {"epochs": EPOCHS}}
    return write_config(folder / f"{name}.yaml", model, folder / name, **options)


def scored(log: Path) -> int:
    """Return how many samples a server has begun to score."""
    return sum(int(line) for line in log.read_text().split()) if log.exists() else 0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_and_restarted_reward_server_changes_nothing(random_sd3: Path, tmp_path: Path) -> None:
    with running(str(SERVER), str(tmp_path / "whole.log"), "0") as server:
        train(config(tmp_path, "whole", random_sd3, server.port))

    first_log, second_log = tmp_path / "first.log", tmp_path / "second.log"
    with dead_port() as port:
        last = AT_THE_START + PER_EPOCH + 2  # of the first server
        with running(str(SERVER), str(first_log), str(port), str(last)) as first:
            run = subprocess.Popen(
                [sys.executable, "-m", "tiltflow", "train", str(config(tmp_path, "broken", random_sd3, port))],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            until(lambda: scored(first_log) >= last or run.poll() is not None)
            first.signal(signal.SIGKILL)
            first.process.wait(10)
        before = scored(first_log)
        time.sleep(OUTAGE)
        with running(str(SERVER), str(second_log), str(port), ready=False):
            _, told = run.communicate(timeout=200)
    assert run.returncode == 0, told

    assert AT_THE_START + PER_EPOCH < before < AT_THE_START + 2 * PER_EPOCH  # it was in the middle of an epoch
    assert scored(second_log) >= 2 * PER_EPOCH - (before - AT_THE_START - PER_EPOCH)
    expected, found = final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["failures/far"] for row in rows if "loss" in row] == [0] * EPOCHS
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    means = [[row["reward/far/mean"] for row in each if "loss" in row] for each in (rows, whole)]
    assert means[0] == means[1] and len(set(means[0])) == EPOCHS
