"""The event loop in a thread of its own: callers of every kind, interruptions, its end, and forks."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.judge_server import JudgeServer
from tiltflow.rewards.loops import LoopClosedError, LoopThread, PerProcess

ROOT = Path(__file__).resolve().parents[2]


class Ends:
    """Counts how often a loop has ended."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> None:
        self.count += 1


async def later(value: int) -> int:
    await asyncio.sleep(0.05)
    return value


def test_many_threads_wait_for_their_own() -> None:
    loop, found, here = LoopThread("test", at_end=Ends()), dict[int, int](), set[int]()

    async def meet(number: int) -> int:
        here.add(number)
        for _ in range(1000):  # ten seconds
            if len(here) == 50:
                return number
            await asyncio.sleep(0.01)
        raise AssertionError(f"only {len(here)} came")

    threads = [
        threading.Thread(target=lambda n=number: found.update({n: loop.run(lambda: meet(n))})) for number in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(50)}


def test_a_running_loop_may_wait_for_this_one() -> None:
    loop = LoopThread("test", at_end=Ends())

    async def ask() -> list[int]:
        here = loop.run(lambda: later(1))  # holds this loop up
        there = await asyncio.gather(*[asyncio.to_thread(loop.run, lambda: later(2)) for _ in range(5)])
        return [here, *there]

    for _ in range(2):
        assert asyncio.run(ask()) == [1, 2, 2, 2, 2, 2]


def test_a_coroutine_that_waits_for_its_own_loop_is_told_so() -> None:
    loop = LoopThread("test", at_end=Ends())

    async def ask() -> int:
        return loop.run(lambda: later(1))

    with pytest.raises(RuntimeError, match="test: a coroutine of this loop waits for another one of it"):
        loop.run(ask)


def test_exceptions_reach_the_caller_and_the_loop_goes_on() -> None:
    loop = LoopThread("test", at_end=Ends())

    async def fail() -> None:
        raise KeyError("what")

    with pytest.raises(KeyError, match="what"):
        loop.run(fail)
    assert loop.run(lambda: later(3)) == 3


def test_an_interrupted_caller_cancels_its_coroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, begun, cancelled = LoopThread("test", at_end=Ends()), threading.Event(), threading.Event()
    here = threading.current_thread()

    async def hang() -> None:
        try:
            begun.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    class Interrupted:
        """A future whose wait is interrupted."""

        def __init__(self, future):
            self.future = future

        def result(self):
            assert begun.wait(20)
            raise KeyboardInterrupt

        def cancel(self):
            return self.future.cancel()

    submit = asyncio.run_coroutine_threadsafe

    def interrupted(*given):
        future = submit(*given)
        return Interrupted(future) if threading.current_thread() is here else future

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(hang)
    assert cancelled.wait(20)
    assert loop.run(lambda: later(1)) == 1


def test_nothing_is_started_before_it_is_needed() -> None:
    before, ends = threading.active_count(), Ends()
    loop = LoopThread("test", at_end=ends)
    loop.close()
    assert (threading.active_count(), ends.count) == (before, 0)
    with pytest.raises(LoopClosedError, match="test is closed"):
        loop.run(lambda: later(1))


def test_closing_ends_what_is_going_on() -> None:
    ends = Ends()
    loop, errors, begun = LoopThread("test", at_end=ends), list[Exception](), threading.Semaphore(0)

    async def hang() -> None:
        begun.release()
        await asyncio.sleep(60)

    def wait() -> None:
        try:
            loop.run(hang)
        except LoopClosedError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert all(begun.acquire(timeout=20) for _ in threads)
    loop.close()
    loop.close()
    for thread in threads:
        thread.join(timeout=20)
    assert [str(error) for error in errors] == ["test was closed meanwhile"] * 4
    assert loop._thread is not None
    loop._thread.join(timeout=20)
    assert not loop._thread.is_alive() and ends.count == 1


def test_it_ends_with_its_last_user() -> None:
    ends = Ends()
    loop = LoopThread("test", at_end=ends)
    loop.run(lambda: later(1))
    thread = loop._thread
    assert thread is not None and thread.daemon
    del loop
    thread.join(timeout=20)
    assert not thread.is_alive() and ends.count == 1


def test_one_per_process() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    each = PerProcess(make)
    assert (each.get(), each.get(), made) == (0, 0, [0])
    each._made = {os.getpid() + 1: 7}  # what a fork finds
    assert (each.get(), each.get(), made) == (1, 1, [0, 1])
    assert each._made[os.getpid() + 1] == 7


FORK = """
import os, sys, threading
from PIL import Image
from tiltflow.rewards import build_reward

reward = build_reward("vllm_evaluate", device="cpu", api_base_url=sys.argv[1], vlm_model="tiny", min_mass=0.0)
images = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in range(0, 240, 60)]


def ask():
    output = reward(prompt=["p"] * 4, image=images)
    assert output.failures == {}, output.failures
    return output.rewards.tolist()


here = ask()
reward._labels._known.get().lock.acquire()  # as if another thread were asking just now
reward._endpoint._line.get().replies._lock.acquire()
child = os.fork()
if child == 0:
    os._exit(0 if ask() == here else 3)
reward._endpoint._line.get().replies._lock.release()
reward._labels._known.get().lock.release()
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
reward._endpoint._line.get().replies._memory.clear()
assert ask() == here  # over the connections that were there before the fork
print("both")
"""


def test_a_fork_makes_its_own_connections_and_does_not_wait_for_threads_that_it_does_not_have(
    judge: JudgeServer,
) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, judge.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert (ran.returncode, ran.stdout) == (0, "both\n"), ran.stderr
    assert ran.stderr == ""
