"""Lanes: what ends a call or a thread never ends more than that."""

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from tests.rewards.samples import batch, engine_of
from tiltflow.errors import RewardError
from tiltflow.rewards import PointwiseRewardModel, RewardModelOutput, build_reward
from tiltflow.rewards.lanes import Call, Lanes

HERE = "tests.rewards.test_lanes"


class TakenMeanwhile(SimpleQueue[Any]):
    """A queue whose last call a lane takes right after somebody looked whether there is one."""

    def empty(self) -> bool:
        was_empty = super().empty()
        if not was_empty:
            self.get_nowait()
        return was_empty


def test_closing_does_not_wait_for_a_call_that_a_lane_took_meanwhile() -> None:
    lanes: Lanes[int] = Lanes(0, name="none", timeout=None)
    lanes._queue = TakenMeanwhile()
    lanes._queue.put(Call(lambda: 1))
    closing = threading.Thread(target=lanes.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert lanes._queue.get_nowait() is None  # told to the threads


def test_a_call_that_ends_while_it_is_given_up_keeps_one_thread_for_its_lane() -> None:
    late, ended = Call(lambda: 1), Call(lambda: 1)
    assert late.give_up()  # another thread takes the lane
    late.run()
    assert not late.settle()
    ended.run()
    assert ended.settle()  # its own thread has taken the next call already
    assert not ended.give_up()
    assert late.given_up and ended.given_up  # nobody waits for either


class Quits(PointwiseRewardModel):
    def __call__(self, prompt, image=None, **fields: Any):
        raise SystemExit(0)


class QuitsWhileLoading(Quits):
    def __init__(self, config: Any, accelerator: Any = None):
        raise SystemExit(0)

    def __call__(self, prompt, image=None, **fields: Any):
        return RewardModelOutput([0.0] * len(prompt))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_library_that_ends_the_process_is_a_failure_and_does_not(asynchronous: bool) -> None:
    table = engine_of(Quits, on_error="mask", async_reward=asynchronous).score(batch([0.1]))
    assert [failure.kind for failure in table.failures] == ["RuntimeError"]
    assert table.failures[0].message.startswith("SystemExit: 0 (at test_lanes.py:")
    with pytest.raises(RewardError, match=r"reward 'r' failed on 1 samples.*RuntimeError: SystemExit: 0"):
        engine_of(Quits, async_reward=asynchronous).score(batch([0.1]))


def test_a_reward_that_ends_the_process_while_it_loads_cannot_be_built() -> None:
    with pytest.raises(RewardError, match="reward 'QuitsWhileLoading' cannot be built: RuntimeError: SystemExit: 0"):
        build_reward(f"{HERE}.QuitsWhileLoading", device="cpu")


def test_a_module_that_ends_the_process_cannot_be_imported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quits_when_imported.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="quits_when_imported cannot be imported: RuntimeError: SystemExit: 0"):
        build_reward("quits_when_imported.Mine")
