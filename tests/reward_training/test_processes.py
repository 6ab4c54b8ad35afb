"""One run on one process and on two, with DDP and with FSDP2: the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.invariant.runs import launch
from tests.reward_training.processes import command

Answers = dict[str, Any]


def start(folder: Path, *, processes: int, kind: str = "ddp") -> list[Answers]:
    """Run the program and return what each process found."""
    launch([*command(processes, kind), "-m", "tests.reward_training.processes", folder, kind])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def numbers(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return what does not depend on the clock."""
    return [{key: value for key, value in step.items() if not key.endswith("seconds")} for step in steps]


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-6, rel=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, start(folder, processes=1)[0]


def test_one_process_resumes_bit_for_bit(alone: tuple[Path, Answers]) -> None:
    _, answers = alone
    assert len(answers["steps"]) == 12
    assert numbers(answers["resumed"]) == numbers(answers["steps"][5:])
    assert answers["error"] == "example 11 cannot be read"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_make_the_run_of_one(alone: tuple[Path, Answers], tmp_path: Path, kind: str) -> None:
    folder, expected = alone
    first, second = start(tmp_path, processes=2, kind=kind)
    assert numbers(first["steps"]) == numbers(second["steps"])
    assert_close(first["steps"], expected["steps"])
    if kind == "ddp":
        assert numbers(first["resumed"]) == numbers(first["steps"][5:])
    else:  # gathered weights lie elsewhere in memory, which changes how a matrix product rounds
        assert_close(first["resumed"], first["steps"][5:])
    assert {first["error"], second["error"]} == {
        "example 11 cannot be read",
        f"rank {0 if 'rank' in second['error'] else 1} failed: DataError: example 11 cannot be read",
    }
    ours, theirs = (load_file(path / "rank0" / "model.safetensors") for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6
    assert (first["sharded"][0] == "DTensor") == (kind == "fsdp")
    if kind == "ddp":
        assert first["mean"]["loss"] == pytest.approx(expected["mean"]["loss"], abs=1e-6)
        assert first["mean"]["metrics"] == pytest.approx(expected["mean"]["metrics"], abs=1e-6)
        assert first["mean"]["gradient"] == pytest.approx(expected["mean"]["gradient"], abs=1e-6)
        assert first["mean"] == second["mean"]


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one(alone: tuple[Path, Answers], tmp_path: Path) -> None:
    from tests.reward_training.processes import trainer
    from tiltflow.runtime.distributed import Distributed

    start(tmp_path, processes=2, kind="fsdp")
    run = trainer(Distributed())
    run.load(tmp_path / "checkpoint")
    assert run.step == 5
    assert_close([dict(step.metrics) for step in run.run()], alone[1]["steps"][5:])
