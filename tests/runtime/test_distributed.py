"""Ranks that fail together, and shares that fit: two real processes."""

import sys
from pathlib import Path

import pytest
import torch

from tests.invariant.runs import launch
from tiltflow.errors import GeometryError
from tiltflow.runtime.distributed import Distributed, check_divisible

PROGRAM = """
import torch
from tiltflow.errors import RewardError, TiltflowError
from tiltflow.runtime.distributed import Distributed

group = Distributed()
answers = [group.sum(torch.tensor(float(group.rank + 1))).item(), group.gather(group.rank), list(group.share("abcd"))]
for failure in (RewardError("judge"), ValueError("mistake")):
    try:
        with group.together():
            if group.rank == 1:
                raise failure
    except Exception as error:
        answers.append((type(error).__name__, str(error)))
for line in group.gather(answers):
    if group.is_main:
        print(line)
group.close()
"""


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = launch([*command, str(tmp_path / "program.py")])
    first, second = done.stdout.strip().split("\n")
    users, programmers = ("TiltflowError", "rank 1 failed: RewardError: judge"), ("RuntimeError", "rank 1 failed: Val")
    assert first.startswith(f"[3.0, [0, 1], ['a', 'b'], {users}, {str(programmers)[:-2]}")
    assert second == "[3.0, [0, 1], ['c', 'd'], ('RewardError', 'judge'), ('ValueError', 'mistake')]"


@pytest.mark.parametrize("bucket", [1, 5, 100])
def test_gradients_are_summed_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    messages: list[int] = []

    def doubled(flat: torch.Tensor) -> None:
        messages.append(flat.numel())
        flat.mul_(2)

    monkeypatch.setattr("tiltflow.runtime.distributed.BUCKET", bucket)
    monkeypatch.setattr("tiltflow.runtime.distributed.dist.all_reduce", doubled)
    group = Distributed()
    group.world_size = 2
    parameters = [torch.nn.Parameter(torch.zeros(2, size)) for size in (1, 2, 3)]
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    parameters[1].grad = None
    group.sum_gradients(parameters)
    assert [p.grad.unique().tolist() for p in parameters if p.grad is not None] == [[2.0], [0.0], [6.0]]
    assert messages == {1: [2, 4, 6], 5: [6, 6], 100: [12]}[bucket]
    group.sum_gradients([])


def test_one_process_is_a_group_of_itself() -> None:
    group = Distributed()
    value = torch.tensor([1.0, 2.0])
    assert group.sum(value) is value
    assert (group.gather("x"), group.share("abc"), group.is_main) == (["x"], "abc", True)
    with pytest.raises(KeyError), group.together():
        raise KeyError


@pytest.mark.parametrize(("value", "nearest"), [(10, "8 or 12"), (3, "4 or 8"), (0, "4 or 8"), (-4, "4 or 8")])
def test_sizes_that_do_not_divide(value: int, nearest: str) -> None:
    with pytest.raises(GeometryError, match=f"size={value} must be a positive multiple of 4 .because.; .* {nearest}$"):
        check_divisible("size", value, 4, why="because")
    check_divisible("size", 8, 4, why="because")
