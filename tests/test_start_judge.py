"""`scripts/start_judge.sh` with a command in vLLM's place that prints its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

from tiltflow.rewards import reward_class

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "start_judge.sh"


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing but these variables set."""
    fake = folder / "fake vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    given = {"PATH": os.environ["PATH"], "VLLM_BIN": str(fake), **environment}
    return subprocess.run([SCRIPT, *arguments], env=given, capture_output=True, text=True, check=False)


def words(model: str, name: str, *, port: int = 8000, tensor: int = 1, data: int = 1) -> list[str]:
    """Return the arguments that vLLM is to be given."""
    options = {"served-model-name": name, "host": "127.0.0.1", "port": port}
    options |= {"tensor-parallel-size": tensor, "data-parallel-size": data}
    return ["serve", model, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def test_it_is_sound_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_defaults_are_those_of_the_reward(tmp_path: Path) -> None:
    name = "RationalRewards-8B-T2I"
    assert start(tmp_path).stdout.splitlines() == words(f"TIGER-Lab/{name}", name)
    options = reward_class("rational_rewards_t2i").Options().model_dump()
    assert (options["vlm_model"], options["api_base_url"]) == (name, "http://localhost:8000/v1")


def test_more_arguments_are_passed_on_as_they_are(tmp_path: Path) -> None:
    more = ["--max-model-len", "8192", "--chat-template", "a b $HOME.jinja", ""]
    assert start(tmp_path, *more).stdout.splitlines()[-5:] == more


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"MODEL_PATH": "TIGER-Lab/RationalRewards-8B-Edit", "PORT": "8001"},
            words("TIGER-Lab/RationalRewards-8B-Edit", "RationalRewards-8B-Edit", port=8001),
        ),
        ({"MODEL_PATH": "/models/my judge//"}, words("/models/my judge", "my judge")),
        ({"MODEL_PATH": "m", "SERVED_MODEL_NAME": "judge"}, words("m", "judge")),
        ({"MODEL_PATH": "m", "CUDA_VISIBLE_DEVICES": "0,1"}, words("m", "m", data=2)),
        (
            {"MODEL_PATH": "m", "CUDA_VISIBLE_DEVICES": "4,5,6,7", "TENSOR_PARALLEL_SIZE": "2"},
            words("m", "m", tensor=2, data=2),
        ),
        (
            {
                "MODEL_PATH": "m",
                "CUDA_VISIBLE_DEVICES": "0,1,2",
                "TENSOR_PARALLEL_SIZE": "2",
                "DATA_PARALLEL_SIZE": "1",
            },
            words("m", "m", tensor=2),
        ),
        ({"MODEL_PATH": "m", "CUDA_VISIBLE_DEVICES": ""}, words("m", "m")),
    ],
)
def test_the_environment(tmp_path: Path, environment: dict[str, str], expected: list[str]) -> None:
    run = start(tmp_path, **environment)
    assert (run.returncode, run.stdout.splitlines()) == (0, expected)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VLLM_BIN": "no-such-vllm"}, "VLLM_BIN=no-such-vllm was not found; install vLLM"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2", "TENSOR_PARALLEL_SIZE": "2"},
            "has 3 devices, which copies of TENSOR_PARALL",
        ),
        ({"TENSOR_PARALLEL_SIZE": "two"}, "TENSOR_PARALLEL_SIZE=two must be a whole number from 1"),
        ({"DATA_PARALLEL_SIZE": "0"}, "DATA_PARALLEL_SIZE=0 must be a whole number from 1"),
        ({"PORT": "http"}, "PORT=http must be a whole number from 1"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    run = start(tmp_path, **environment)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("start_judge.sh: ") and message in run.stderr
