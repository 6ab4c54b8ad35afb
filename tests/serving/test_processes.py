"""What becomes of a served model when its worker processes die, hang, or cannot be made, and when its parent dies."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.serving.helpers import (
    LATE,
    allow,
    ask,
    calls,
    codes,
    is_running,
    nothing_left,
    run,
    serving,
    submit,
    until,
    worker_pids,
)
from tests.serving.scorers import Failing, Parent, Plain, Slow
from tests.serving.test_models import Counting
from tests.sockets import read_line
from tiltflow.serving import replica
from tiltflow.serving.jobs import Sample, ScorerSource
from tiltflow.serving.models import ServedModel
from tiltflow.serving.wire import WireError


class Restarts(Counting):
    """Counts the replaced processes too."""

    def __init__(self) -> None:
        super().__init__()
        self.restarts = 0

    def restart(self, model: str) -> None:
        self.restarts += 1


def test_a_worker_killed_in_a_call_is_replaced() -> None:
    async def test() -> None:
        metrics = Restarts()
        async with serving(metrics=metrics) as model:
            [before] = worker_pids()
            running = submit(model, ["sleep=30", "1"])
            await until(lambda: model.queue_items == 0)
            waiting = submit(model, ["2"])
            os.kill(before, signal.SIGKILL)
            answers = await asyncio.gather(*running)
            assert codes(answers) == ["worker_lost"] * 2
            assert answers[0].error is not None and answers[0].error.status == 503 and answers[0].error.retryable
            await until(lambda: model.state == "LOADING")
            with pytest.raises(WireError) as caught:
                submit(model, ["3"])
            assert caught.value.code == "loading" and caught.value.retry_after_ms
            assert codes(await asyncio.gather(*waiting)) == [""]  # it was not in the call that died
            assert model.state == "READY" and before not in worker_pids()
            assert codes(await ask(model, ["4"])) == [""]
        assert metrics.restarts == 1
        assert metrics.states == ["LOADING", "READY", "LOADING", "READY", "DRAINING"]

    run(test())


@pytest.mark.parametrize("prompt", ["die", "exit"])
def test_three_crashes_fail_the_model(prompt: str) -> None:
    async def test() -> None:
        async with serving() as model:
            for crash in range(3):
                await model.wait_ready()
                first, later = (
                    submit(model, [f"{prompt}={crash}", "1"])[0],
                    submit(model, [Sample(image=None, meta={"a": 1})])[0],
                )
                assert codes([await first]) == ["worker_lost"]
                assert codes([await later]) == ["" if crash < 2 else "model_failed"]
            assert model.state == model.info.state == "FAILED"
            with pytest.raises(WireError, match="3 worker processes were lost within 60 s") as caught:
                submit(model, ["1"])
            assert caught.value.code == "model_failed" and not caught.value.retryable
            assert ("SIGKILL" if prompt == "die" else "ended with code 3") in caught.value.message
            with pytest.raises(WireError, match="3 worker processes"):
                await model.wait_ready()
            assert worker_pids() == []

    run(test())


@pytest.mark.slow
def test_crashes_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "CRASH_SECONDS", 0.3)

    async def test() -> None:
        async with serving() as model:
            for crash in range(4):
                await model.wait_ready()
                await asyncio.sleep(0.35)
                assert codes(await ask(model, [f"die={crash}"])) == ["worker_lost"]
            await until(lambda: model.state == "READY")

    run(test())


def test_an_idle_worker_that_dies_is_replaced_at_once() -> None:
    async def test() -> None:
        async with serving() as model:
            [pid] = worker_pids()
            os.kill(pid, signal.SIGKILL)
            assert await until(lambda: model.state == "LOADING") < LATE  # it would be asked after 5 s of silence
            await until(lambda: model.state == "READY")
            assert codes(await ask(model, ["1"])) == [""]

    run(test())


@pytest.mark.parametrize("prompt", ["sleep=30", "hang"])
def test_a_call_that_hangs_ends_at_the_hard_deadline(prompt: str) -> None:
    async def test() -> None:
        async with serving(batch_seconds=0.5) as model:
            [pid] = worker_pids()
            begun = time.monotonic()
            answers = await ask(model, [prompt, "1"])
            assert 0.5 <= time.monotonic() - begun < 0.5 + LATE
            assert codes(answers) == ["deadline_exceeded"] * 2
            assert answers[0].error is not None and "did not answer within 0.5 s" in answers[0].error.message
            allow(model)
            await until(lambda: model.state == "LOADING")
            await until(lambda: model.state == "READY")
            assert not is_running(pid)
            assert codes(await ask(model, ["2"])) == [""]

    run(test())


def test_a_stopped_worker_is_killed_at_the_deadline_and_replaced() -> None:
    async def test() -> None:
        async with serving(batch_seconds=0.5) as model:
            [pid] = worker_pids()
            os.kill(pid, signal.SIGSTOP)
            assert codes(await ask(model, ["1"])) == ["deadline_exceeded"]
            allow(model)
            await until(lambda: model.state == "READY" and pid not in worker_pids())
            assert codes(await ask(model, ["1"])) == [""]

    run(test())


def test_a_stopped_idle_worker_is_found_by_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "PING_SECONDS", 0.2)
    monkeypatch.setattr(replica, "PONG_SECONDS", 1.6)
    monkeypatch.setattr(replica, "WATCH_SECONDS", 0.1)

    async def test() -> None:
        async with serving() as model:
            [pid] = worker_pids()
            await asyncio.sleep(2.2)
            assert worker_pids() == [pid]  # it answered every ping
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: model.state == "READY" and worker_pids() not in ([], [pid]))
            assert not is_running(pid)

    run(test())


def test_a_death_that_does_not_close_the_socket_is_seen(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def test() -> None:
        async with serving(Parent, options={"pids": str(pids)}) as model:
            pid, child = map(int, pids.read_text().split())
            assert is_running(child)
            os.kill(pid, signal.SIGKILL)
            assert await until(lambda: not is_running(child)) < 3.0  # what the model started ends with it
            await until(lambda: model.state == "READY" and pid not in worker_pids())
            pid, child = map(int, pids.read_text().split())
        await until(lambda: not is_running(child), seconds=2.0)

    run(test())


def test_one_of_two_replicas_goes_on_alone() -> None:
    async def test() -> None:
        async with serving(replicas=2) as model:
            await until(lambda: len(worker_pids()) == 2 and all(lane.state == "READY" for lane in model._lanes))
            os.kill(worker_pids()[0], signal.SIGKILL)
            found = []
            for _ in range(20):
                found += codes(await ask(model, ["1"]))
                assert model.state == "READY"
            assert sorted(found)[:19] == [""] * 19  # at most one went to the dead process before its death was seen
            await until(lambda: all(lane.state == "READY" for lane in model._lanes))

    run(test())


def test_signals_that_a_terminal_sends_are_the_parents_business(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as model:
            [pid] = worker_pids()
            begun, go = tmp_path / "begun", tmp_path / "go"
            running = submit(model, [f"make={begun}", f"until={go}"])
            await until(begun.exists)
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
            go.touch()
            assert codes(await asyncio.gather(*running)) == [""] * 2
            assert os.getpgid(pid) == pid != os.getpgrp()

    run(test())


def test_the_state_while_it_loads(tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def test() -> None:
        model = ServedModel("m", ScorerSource(Slow, {"until": str(go)}))
        await model.start()  # waits for nothing
        with pytest.raises(WireError) as caught:
            submit(model, ["1"])
        assert caught.value.code == "loading" and model.info.state == "LOADING"
        go.touch()
        await model.wait_ready()
        assert codes(await ask(model, ["1"])) == [""]
        await model.stop(drain_seconds=1.0)

    run(test())


def test_a_model_that_is_never_ready_has_failed() -> None:
    async def test() -> None:
        model = ServedModel("m", ScorerSource(Slow, {"load": 60.0}), load_seconds=1.5)
        await model.start()
        begun = time.monotonic()
        with pytest.raises(WireError, match="the model was not made within") as caught:
            await model.wait_ready()
        assert caught.value.code == "model_failed" and 1.4 < time.monotonic() - begun < 6.0
        assert worker_pids() == []
        await model.stop(drain_seconds=0.0)

    run(test())


def test_what_waits_is_told_when_the_last_worker_fails_while_the_model_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "CRASHES", 1)

    async def test() -> None:
        async with serving(batch_size=1) as model:
            waiting = submit(model, ["sleep=0.3", "die", "1", "2"])
            begun = time.monotonic()
            await model.stop(drain_seconds=20.0)
            assert time.monotonic() - begun < 5.0
            assert codes(await asyncio.gather(*waiting)) == ["", "worker_lost", "model_failed", "model_failed"]

    run(test())


def test_stopping_while_it_loads_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        for delay in (0.0, 0.01, 0.4):
            model = ServedModel("m", ScorerSource(Slow, {"load": 30.0}), replicas=2)
            await model.start()
            await asyncio.sleep(delay)
            begun = time.monotonic()
            await model.stop(drain_seconds=10.0)
            assert time.monotonic() - begun < 1.0 + LATE
            assert worker_pids() == []

    run(test())


def test_stopping_twice_at_once_and_while_a_worker_is_replaced() -> None:
    async def test() -> None:
        for delay in (0.0, 0.01, 0.1):
            async with serving(replicas=2) as model:
                await until(lambda model=model: all(lane.state == "READY" for lane in model._lanes))
                running = submit(model, ["sleep=30"])
                await asyncio.sleep(0.05)
                running += submit(model, ["die", "1"])
                await asyncio.wait(running[1:])
                await asyncio.sleep(delay)
                begun = time.monotonic()
                await asyncio.gather(model.stop(drain_seconds=20), model.stop(drain_seconds=0))
                assert time.monotonic() - begun < 2.0
                assert codes(await asyncio.gather(*running)) == ["draining", "worker_lost", "worker_lost"]
                assert worker_pids() == []

    run(test())


def local_class() -> type[Plain]:
    class Local(Plain):
        pass

    return Local


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (Failing, {}, "m: FileNotFoundError: no weights at /nowhere"),
        (Failing, {"how": "exit"}, "m: the worker process ended with code 5 before the model was made"),
        (Failing, {"how": "die"}, "m: the worker process was killed by SIGSEGV before the model was made"),
        (Plain, {"colour": "red"}, "m: TypeError: .*unexpected keyword argument 'colour'"),
        (Plain, {"log": lambda: "x"}, "arguments must be plain values"),
        (local_class(), {}, "must stand at the top level of a module"),
        (Sample, {}, "AttributeError: 'Sample' object has no attribute 'describe'"),
    ],
)
def test_a_model_that_cannot_be_made_has_failed(factory: type[Plain], options: dict[str, str], message: str) -> None:
    async def test() -> None:
        with pytest.raises(WireError, match=message) as caught:
            async with serving(factory, options=options):
                pass
        assert caught.value.code == "model_failed"

    run(test())


def test_a_model_that_cannot_be_made_again_has_failed_after_three_tries(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Failing, options={"first": str(tmp_path / "first")}) as model:
            assert codes(await ask(model, ["die"])) == ["worker_lost"]
            with pytest.raises(WireError, match=r"3 worker processes were lost.*no weights at /nowhere"):
                await model.wait_ready()  # still READY, or LOADING again
                await until(lambda: model.state != "READY")
                await model.wait_ready()

    run(test())


PARENT = """
import asyncio, sys, time
from tests.serving.scorers import {scorer}
from tiltflow.serving.jobs import Sample, ScorerSource
from tiltflow.serving.models import ServedModel

async def main():
    model = ServedModel("m", ScorerSource({scorer}, {options}))
    await model.start()
    if {wait}:
        await model.wait_ready()
    for future in model.submit([Sample(prompt="{prompt}")], deadline=time.monotonic() + 60) if "{prompt}" else []:
        future.add_done_callback(print)
    await asyncio.sleep(0.3)
    if {leave}:
        return
    print("started", flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


def parent(
    tmp_path: Path, scorer: str, options: str, *, wait: bool = True, prompt: str = "", leave: bool = False
) -> Path:
    """Write a script that serves a model."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(PARENT.format(scorer=scorer, options=options, wait=wait, prompt=prompt, leave=leave))
    )
    return script


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("scorer", "wait", "prompt"),
    [("Parent", True, ""), ("Parent", True, "sleep=60"), ("Parent", True, "hang"), ("Slow", False, "")],
)
def test_a_worker_does_not_outlive_its_killed_parent(tmp_path: Path, scorer: str, wait: bool, prompt: str) -> None:
    pids = tmp_path / "pids"
    options = {"pids": str(pids), **({"load": 60.0} if scorer == "Slow" else {})}
    script = parent(tmp_path, scorer, repr(options), wait=wait, prompt=prompt)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert read_line(process.stdout) == b"started\n"
        end = time.monotonic() + 30
        while not pids.exists() or not pids.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        family = [int(pid) for pid in pids.read_text().split()]
        assert all(map(is_running, family))
        process.kill()
        killed = time.monotonic()
    while any(map(is_running, family)):
        assert time.monotonic() - killed < 2.0 + LATE
        time.sleep(0.01)


def test_a_parent_that_leaves_without_stopping_does_not_hang(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = parent(tmp_path, "Parent", repr({"pids": str(pids)}), prompt="sleep=60", leave=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode()
    assert time.monotonic() - begun < 10
    assert not any(is_running(int(pid)) for pid in pids.read_text().split())


SCRIPT = """
import asyncio, time
from tests.serving.scorers import Plain
from tiltflow.serving.jobs import Sample, ScorerSource
from tiltflow.serving.models import ServedModel

class Mine(Plain):
    def score(self, samples):
        return [7.0] * len(samples), {{}}, {{}}

async def main():
    model = ServedModel("mine", ScorerSource(Mine))
    await model.start()
    try:
        await model.wait_ready()
        [future] = model.submit([Sample(prompt="1")], deadline=time.monotonic() + 20)
        print((await future).score)
    finally:
        await model.stop(drain_seconds=1.0)

{guard}asyncio.run(main())
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_class_of_the_users_own_script(tmp_path: Path, guarded: bool) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(guard="if __name__ == '__main__': " if guarded else ""))
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=30)
    if guarded:
        assert (done.returncode, done.stdout, done.stderr) == (0, "7.0\n", "")
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            "mine: the worker process ended with code 1 before the model was made; what it printed tells more"
        )
        assert "if __name__ == '__main__':" in done.stderr


@pytest.mark.slow
def test_many_deaths_leave_nothing_and_no_answer_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "CRASHES", 1000)
    monkeypatch.setattr(replica, "BACKOFF_SECONDS", 0.0)

    async def test() -> None:
        log = tmp_path / "log"
        async with serving(options={"log": str(log)}, replicas=2, batch_size=4) as model:
            answered, lost = 0, 0
            end = time.monotonic() + 4.0

            async def client(number: int) -> None:
                nonlocal answered, lost
                while time.monotonic() < end:
                    try:
                        [answer] = await ask(model, [str(number)])
                    except WireError as error:
                        assert error.code == "loading"
                        await asyncio.sleep(0.02)
                        continue
                    if answer.error is None:
                        assert answer.score == number
                        answered += 1
                    else:
                        assert answer.error.code == "worker_lost"
                        lost += 1

            async def killer() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(0.3)
                    for pid in worker_pids()[:1]:
                        os.kill(pid, signal.SIGKILL)

            await asyncio.gather(killer(), *(client(number) for number in range(12)))
            assert answered > 100 and lost < answered
            assert sum(map(len, calls(log))) >= answered

    with nothing_left():
        run(test())
