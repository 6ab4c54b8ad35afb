"""The HTTP process's side of one worker process: starts it, calls it, watches it, and replaces it when it is lost."""

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from tiltflow.serving import worker
from tiltflow.serving.frames import Frames, frame
from tiltflow.serving.jobs import THREAD_BYTES, Sample, ScorerSource
from tiltflow.serving.memory import Arena
from tiltflow.serving.wire import ModelInfo, WireError

CRASHES = 3  # within CRASH_SECONDS: the replica has failed
CRASH_SECONDS = 60.0
BACKOFF_SECONDS = 0.25  # before the second start in a row; doubled with each
WATCH_SECONDS = 1.0  # between looks at the process
PING_SECONDS = 5.0  # of silence before an idle worker is asked whether it is there
PONG_SECONDS = 10.0  # it has to answer
EXIT_SECONDS = 2.0  # for a process whose model could not be made to end by itself
LAST_SECONDS = 0.5  # for a process that has closed its socket to end, so that its own exit code is told
REAP_SECONDS = 5.0  # for the kernel to end a killed process

LOST = "worker_lost"
OVERDUE = "deadline_exceeded"


@dataclass(frozen=True)
class Answer:
    """What came of a call."""

    kind: str  # "scores", "oom", "pong", or a code of the wire
    message: str = ""
    scores: Sequence[float | None] = ()  # B; None is a score that is not finite, or a failure
    components: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    failures: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])  # place -> code, text
    seconds: float = 0.0  # that the model took
    begun: bool = True  # the worker may have seen the samples


class Process:
    """One worker process from its start to its end."""

    def __init__(self, name: str, lost: Callable[[], None]):
        """Prepare a process.

        Args:
            name: Of its model, for messages and process lists.
            lost: Called once when it is gone, unless it was closed.
        """
        self.alive = False
        self._name = name
        self._lost = lost
        self._arena = Arena.create()
        self._child: SpawnProcess | None = None
        self._link: asyncio.Transport | None = None
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._calls = 0
        self._heard = time.monotonic()
        self._watcher: asyncio.Task[None] | None = None

    async def open(self, source: ScorerSource, *, seconds: float) -> ModelInfo:
        """Start the process and let it make the model.

        Args:
            source: Of the model.
            seconds: For that.

        Raises:
            WireError: `model_failed`, with what the model's constructor raised or how the process ended.
        """
        content = _pickled(self._name, source)
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        ours, theirs = socket.socketpair()
        receiver, sender = context.Pipe(duplex=False)
        # Not daemonic: such a process may not start others, which data loaders and inference engines do.
        child = context.Process(
            target=worker.main, args=(receiver, theirs, self._arena), name=f"tiltflow {self._name}", daemon=False
        )
        self._ready = loop.create_future()
        with contextlib.ExitStack() as ends:
            ends.enter_context(ours)
            ends.enter_context(sender)
            with receiver, theirs:
                child.start()
            self._child = child
            atexit.register(self.kill)  # or the interpreter would wait at its exit for the process to end
            self._link, _ = await loop.create_unix_connection(lambda: _Link(self), sock=ours)
            ends.pop_all()  # the link closes the one, and the thread below the other
        await asyncio.shield(loop.run_in_executor(None, _send, sender, content))  # it must close its end in any case
        await asyncio.wait((self._ready,), timeout=seconds)
        if not self._ready.done():
            text = f"the model was not made within {seconds:g} s; mend what it waits for, or allow more (load_seconds)"
            raise WireError("model_failed", text)
        message = self._ready.result()
        if message["kind"] == "gone":
            await self._exited(REAP_SECONDS)
            text = f"the worker process {_ending(child.exitcode)} before the model was made; what it printed tells more"
            raise WireError("model_failed", text)
        if message["kind"] == "failed":
            raise WireError("model_failed", message["message"])
        self.alive = True
        self._watcher = asyncio.create_task(self._watch())
        return ModelInfo.model_validate(message["info"])

    async def call(self, samples: Sequence[Sample], *, seconds: float) -> Answer:
        """Let the model score a batch; one call at a time, because there is one arena.

        Args:
            samples: B samples.
            seconds: The process is killed when it takes longer.
        """
        metas = [None if sample.meta is None else dict(sample.meta) for sample in samples]
        put = partial(self._arena.put, samples)
        if sum(sample.nbytes for sample in samples) < THREAD_BYTES:
            layouts = put()
        else:
            layouts = await asyncio.get_running_loop().run_in_executor(None, put)
        return await self._ask(
            {
                "do": "score",
                "prompts": [sample.prompt for sample in samples],
                "metas": metas if any(meta is not None for meta in metas) else None,
                "layouts": layouts,
                "size": self._arena.size,
                "used": self._arena.used,
            },
            seconds,
        )

    def kill(self) -> None:
        """End the process at once, and what it has started."""
        self.alive = False
        if self._child is not None and self._child.pid is not None:
            self._child.kill()
            with contextlib.suppress(ProcessLookupError):  # all gone, or too young to have a group of its own
                os.killpg(self._child.pid, signal.SIGKILL)

    async def close(self, *, seconds: float) -> str:
        """End the process and free what it used; a second call does no harm, nor one after an interrupted one.

        Args:
            seconds: For it to end by itself before it is killed.

        Returns:
            How it ended, for people.
        """
        self._lost = _nothing
        if self._watcher is not None:
            self._watcher.cancel()
        if self._link is not None:
            self._link.close()
            await asyncio.sleep(0)  # the loop closes the socket in its next round
        await self._exited(seconds)
        self.kill()
        await self._exited(REAP_SECONDS)
        atexit.unregister(self.kill)
        child, self._child = self._child, None
        code = None if child is None else child.exitcode
        if child is not None and code is not None:
            child.close()
        self._arena.close()
        return _ending(code)

    async def _exited(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._child is not None and self._child.exitcode is None and time.monotonic() < end:
            await asyncio.sleep(0.005)

    async def _ask(self, message: dict[str, Any], seconds: float) -> Answer:
        if not self.alive or self._link is None:
            return Answer(LOST, "the worker process is gone", begun=False)
        loop = asyncio.get_running_loop()
        self._calls += 1
        number = self._calls
        future = self._waiting[number] = loop.create_future()
        timer = loop.call_later(seconds, self._overdue, number, seconds)
        try:
            self._link.write(frame({**message, "call": number}))
            return await future
        finally:
            timer.cancel()
            del self._waiting[number]

    def _overdue(self, number: int, seconds: float) -> None:
        """Give a call up that has taken too long, together with the process: there is no other way to stop it."""
        if not self._waiting[number].done():
            text = f"the model did not answer within {seconds:g} s; its worker process is replaced"
            self._waiting[number].set_result(Answer(OVERDUE, text))
            self.kill()

    async def _watch(self) -> None:
        """See a death that the closing of the socket does not show, and ask a silent idle process for an answer."""
        while self.alive:
            await asyncio.sleep(WATCH_SECONDS)
            if self._child is None or self._child.exitcode is not None:
                self.gone()
            elif not self._waiting and time.monotonic() - self._heard > PING_SECONDS:
                await self._ask({"do": "ping"}, PONG_SECONDS)

    def heard(self, message: dict[str, Any]) -> None:
        """Take a message of the process."""
        self._heard = time.monotonic()
        if message["kind"] in ("ready", "failed"):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
            return
        future = self._waiting.get(message.pop("call"))
        if future is not None and not future.done():
            future.set_result(Answer(**message))

    def gone(self) -> None:
        """Note that the process has ended or cannot be talked to any more."""
        self.alive = False
        if self._ready is not None and not self._ready.done():
            self._ready.set_result({"kind": "gone"})
        for future in self._waiting.values():
            if not future.done():
                future.set_result(Answer(LOST, "the worker process died during the call; it is replaced"))
        lost, self._lost = self._lost, _nothing
        lost()


class _Link(asyncio.Protocol):
    """Passes what arrives on the control socket to its process."""

    def __init__(self, process: Process):
        self._process = process
        self._frames = Frames()

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._process.heard(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._process.gone()


class Replica:
    """Keeps a worker process: replaces a lost one, until too many were lost."""

    def __init__(self, name: str, source: ScorerSource, *, load_seconds: float, lost: Callable[[], None]):
        """Describe a replica.

        Args:
            name: Of its model.
            source: How the worker makes it.
            load_seconds: How long that may take.
            lost: Called when the process is gone; `restart` is next.
        """
        self._name = name
        self._source = source
        self._load_seconds = load_seconds
        self._lost = lost
        self._process: Process | None = None
        self._crashes: list[float] = []
        self._excused = False
        self._answered = False  # a call has come back, from this process or one before

    @property
    def alive(self) -> bool:
        """Tell whether it can be called."""
        return self._process is not None and self._process.alive

    def excuse(self) -> None:
        """Do not count the loss of this process, if the model has ever worked: a sample was to blame for it."""
        self._excused = self._answered

    async def start(self) -> ModelInfo:
        """Start the first process, and give up if that fails: it would fail again.

        Raises:
            WireError: `model_failed`, with what the model's constructor raised or how the process ended.
        """
        self._process = Process(self._name, self._lost)
        try:
            return await self._process.open(self._source, seconds=self._load_seconds)
        except WireError as error:
            await self.stop(seconds=EXIT_SECONDS)
            raise WireError("model_failed", f"{self._name}: {error.message}") from error
        except (OSError, RuntimeError) as error:  # no memory or descriptors, or a script that starts itself again
            await self.stop(seconds=EXIT_SECONDS)
            message = f"{self._name}: its worker process cannot be started: {' '.join(str(error).split())}"
            raise WireError("model_failed", message) from error

    async def restart(self) -> ModelInfo:
        """Replace a lost process, again if that one is lost while it loads.

        Raises:
            WireError: `model_failed`: too many were lost.
        """
        how = "is gone"
        while True:
            if self._process is not None:
                how = await self.stop(seconds=LAST_SECONDS)
            now = time.monotonic()
            self._crashes = [at for at in self._crashes if now - at < CRASH_SECONDS]
            if not self._excused:
                self._crashes.append(now)
            self._excused = False
            if len(self._crashes) >= CRASHES:
                raise WireError(
                    "model_failed",
                    f"{self._name}: {CRASHES} worker processes were lost within {CRASH_SECONDS:g} s; the last one "
                    f"{how}; restart the server when the cause is mended",
                )
            if len(self._crashes) > 1:
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (len(self._crashes) - 2))
            try:
                return await self.start()
            except WireError as error:
                how = f"could not make the model: {error.message}"

    async def call(self, samples: Sequence[Sample], *, seconds: float) -> Answer:
        """Let the model score a batch; see `Process.call`."""
        if self._process is None:
            return Answer(LOST, "the worker process is gone", begun=False)
        answer = await self._process.call(samples, seconds=seconds)
        self._answered = self._answered or answer.kind not in (LOST, OVERDUE)
        return answer

    async def stop(self, *, seconds: float) -> str:
        """End the process and tell how it ended; see `Process.close`."""
        if self._process is None:
            return "is gone"
        how = await self._process.close(seconds=seconds)
        self._process = None
        return how


def _pickled(name: str, source: ScorerSource) -> bytes:
    """Return what the worker needs to make the model.

    Raises:
        WireError: `model_failed`: it cannot be sent to another process.
    """
    try:
        return bytes(ForkingPickler.dumps(source))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise WireError(
            "model_failed",
            f"{name} cannot be sent to its worker process: {error}; its class must stand at the top level of a module "
            "or script, and its constructor's arguments must be plain values",
        ) from error


def _send(sender: Connection, content: bytes) -> None:
    """Send and close, in a thread: the worker may not read before it has imported the user's script."""
    with sender, contextlib.suppress(BrokenPipeError):  # the closing of the socket tells that it is gone
        sender.send_bytes(content)


def _ending(code: int | None) -> str:
    if code is None:
        return "does not end"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _nothing() -> None:
    pass
