"""What fails in one of two processes ends both, each with one message of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.invariant.runs import ROOT, environment, write_config
from tests.sockets import dead_port


def train_in_two(config: Path) -> list[tuple[int, str]]:
    """Run `tiltflow train` in two processes without a launcher, which would end one with the other.

    Returns:
        The exit status and the standard error of each rank.
    """
    with dead_port() as port:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tiltflow", "train", str(config)],
                env=environment(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", **meeting),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        try:
            told = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


@pytest.mark.parametrize(
    ("reward", "options", "cause"),
    [
        ("CannotBeBuiltOnTheSecondProcess", {}, "reward 'mine' cannot be built: MemoryError: no room"),
        pytest.param("FailsOnTheSecondProcess", {}, "reward 'mine' failed on ", marks=pytest.mark.slow),
        ("FailsOnTheSecondProcess", {"async_reward": True, "num_workers": 2}, "reward 'mine' failed on "),
    ],
    ids=["constructor", "sync", "async"],
)
def test_a_reward_that_fails_in_one_process_ends_both(
    random_sd3: Path, tmp_path: Path, reward: str, options: dict[str, Any], cause: str
) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        random_sd3,
        tmp_path / "out",
        rewards=[{"name": "mine", "reward_model": f"tests.rewards_for_tests.{reward}", **options}],
        eval_rewards=[{"name": "other", "reward_model": "tests.rewards_for_tests.Brightness"}],
        evaluation={"max_prompts": 2, "num_steps": 1},
        sampler={"num_steps": 1},
    )
    for rank, (status, told) in enumerate(train_in_two(config)):
        assert status == 2, told
        assert "Traceback" not in told
        messages = [line for line in told.splitlines() if line.startswith("tiltflow train: ")]
        where = "tiltflow train: " if rank == 1 else "tiltflow train: rank 1 failed: RewardError: "
        assert len(messages) == 1 and messages[0].startswith(where + cause), told


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_process_keeps_what_was_learnt(random_sd3: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        random_sd3,
        tmp_path / "out",
        train={"save_every": 50, "evaluate_every": 1},
        eval_rewards=[{"name": "other", "reward_model": "tests.rewards_for_tests.BreaksLaterOnTheSecondProcess"}],
        evaluation={"max_prompts": 2, "num_steps": 1},
        sampler={"num_steps": 1},
    )
    for status, told in train_in_two(config):
        assert status == 2, told
        assert "Traceback" not in told
        assert "the judge went home" in told and "; the weights after epoch 1 are saved in " in told
    assert (tmp_path / "out" / "latest").resolve().name == "epoch_000001"
