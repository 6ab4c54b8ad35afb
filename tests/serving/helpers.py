"""What the tests of served models have in common."""

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.serving.scorers import Plain
from tiltflow.serving.jobs import Sample, Scored, ScorerSource
from tiltflow.serving.models import ServedModel

FOR_EVERYTHING = 50.0  # seconds that one test may take
LATE = 2.0  # seconds by which a busy machine may be late


def run(test: Awaitable[None]) -> None:
    """Run an asynchronous test, which must not hang."""

    async def limited() -> None:
        await asyncio.wait_for(test, FOR_EVERYTHING)

    asyncio.run(limited())


@contextlib.asynccontextmanager
async def serving(
    factory: Callable[..., Any] = Plain,
    *,
    borrows: bool = False,
    remote: bool = False,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[ServedModel]:
    """Serve a model and stop it, whatever happens."""
    model = ServedModel("m", ScorerSource(factory, options or {}, borrows=borrows, remote=remote), **settings)
    await model.start()
    try:
        await model.wait_ready()
        yield model
    finally:
        await model.stop(drain_seconds=0.0)


async def ask(
    model: ServedModel, samples: Sequence[Sample | str], *, seconds: float = 30.0, **how: Any
) -> list[Scored]:
    """Submit samples, or prompts, and wait for their answers."""
    return await asyncio.gather(*submit(model, samples, seconds=seconds, **how))


def submit(
    model: ServedModel, samples: Sequence[Sample | str], *, seconds: float = 30.0, **how: Any
) -> "list[asyncio.Future[Scored]]":
    """Submit samples, or prompts."""
    made = [Sample(prompt=sample) if isinstance(sample, str) else sample for sample in samples]
    return model.submit(made, deadline=time.monotonic() + seconds, **how)


def codes(answers: Sequence[Scored]) -> list[str]:
    """Return the code of each error, "" for a score."""
    assert all((answer.error is None) == (answer.score is not None) for answer in answers)
    return ["" if answer.error is None else answer.error.code for answer in answers]


async def until(condition: Callable[[], bool], *, seconds: float = 15.0) -> float:
    """Wait for a condition; return how long it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it did not happen"
        await asyncio.sleep(0.005)
    return time.monotonic() - begun


def allow(model: ServedModel, seconds: float = 30.0) -> None:
    """Let the calls from now on take so long: what hangs ends soon, and what must succeed may take its time."""
    for lane in model._lanes:
        lane._batch_seconds = seconds


def calls(log: Path) -> list[list[str]]:
    """Return the prompts of each call that a `Plain` model has written down."""
    return [line.split(" ") for line in log.read_text().splitlines()]


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def worker_pids() -> list[int]:
    """Return the worker processes of this one."""
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def descriptors() -> set[str]:
    """Return what this process has open, without the pipe of multiprocessing's own tracker."""
    names = set()
    for place in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(os.readlink(place))
    return names


def arenas() -> int:
    """Return how many arenas this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:tiltflow")


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that neither a process nor memory nor a descriptor is left behind."""
    multiprocessing.resource_tracker.ensure_running()  # started once for the whole process, with a pipe
    open_before, memory_before, maps_before = descriptors(), set(os.listdir("/dev/shm")), arenas()
    yield
    assert worker_pids() == []
    left = {name for name in descriptors() - open_before if not name.startswith("/")}
    assert left == set()
    assert set(os.listdir("/dev/shm")) - memory_before == set()
    assert arenas() <= maps_before
