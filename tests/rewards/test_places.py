"""Which place of a failure is told: the reader's own, where there is one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.rewards.samples import batch, entry
from tiltflow.errors import DataError
from tiltflow.flow import sigma_schedule
from tiltflow.rewards import RewardEngine
from tiltflow.rewards.places import with_place

SOURCE = """
import json
import torch
from PIL import Image
from tiltflow.rewards import PointwiseRewardModel, RewardModelOutput
from tiltflow.rewards.crowd import do_all


def helper(text):
    return json.loads(text)


class Broken(PointwiseRewardModel):
    def __call__(self, prompt, image=None, **media):
        return helper("{")


class Marked(PointwiseRewardModel):
    def __call__(self, prompt, image=None, **media):
        failures = {}
        try:
            Image.new("RGB", (1, 1)).convert("no such mode")
        except Exception as error:
            failures[1] = error
        return RewardModelOutput([0.0] * len(prompt), failures=failures)


class Quits(PointwiseRewardModel):
    def __call__(self, prompt, image=None, **media):
        raise SystemExit("no licence")


class Asks(PointwiseRewardModel):
    def __call__(self, prompt, image=None, **media):
        done = do_all(self.ask, prompt, at_once=2)
        return RewardModelOutput([0.0] * len(prompt), failures={0: done.failures[0]})

    def ask(self, prompt):
        raise SystemExit("no licence")
"""


@pytest.mark.parametrize(
    ("name", "line", "samples"),
    [("Broken", 10, (0, 1)), ("Marked", 22, (1,)), ("Quits", 30, (0, 1)), ("Asks", 39, (0,))],
)
@pytest.mark.parametrize("lanes", [{}, {"async_reward": True}])
def test_a_failure_tells_the_line_of_the_rewards_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: int, samples: tuple[int, ...], lanes: dict
) -> None:
    """Not the line of the library that it calls, nor of what tiltflow called it with."""
    (tmp_path / "my_broken_reward.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    reward = entry("r", f"my_broken_reward.{name}", on_error="mask", **lanes)
    (failure,) = RewardEngine([reward]).score(batch([0.1, 0.2])).failures
    assert failure.samples == samples
    assert failure.message.endswith(f" (at my_broken_reward.py:{line})")


def raised(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:
        call()
    # Without the frames of this file, as if the call had come from tiltflow alone.
    error = found.value
    assert error.__traceback__ is not None
    last = error.__traceback__
    while last.tb_next is not None and last.tb_frame.f_code.co_filename == __file__:
        last = last.tb_next
    return error.with_traceback(last if last.tb_frame.f_code.co_filename != __file__ else None)


def test_there_is_no_place_in_tiltflow_torch_or_python() -> None:
    for call in (lambda: sigma_schedule(-1), lambda: torch.nn.Linear(2, 2)(torch.zeros(3)), lambda: json.loads("{")):
        error = raised(call)
        assert with_place(error) == str(error)


def test_an_error_of_tiltflow_speaks_for_itself() -> None:
    with pytest.raises(DataError) as found:
        raise DataError("no such file")
    assert with_place(found.value) == "no such file"
