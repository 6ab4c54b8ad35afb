"""What runs in a worker process: it makes the model, then answers one batch after the other until its parent is gone.

The process has a process group of its own, so that what the model starts ends with it. Ctrl-C and SIGTERM are the
parent's business, which finishes what is queued first.
"""

import fcntl
import gc
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np

from tiltflow.runtime.malloc import keep_memory
from tiltflow.serving.frames import Channel
from tiltflow.serving.jobs import Sample, Scorer, ScorerSource
from tiltflow.serving.memory import Arena
from tiltflow.serving.wire import WireError

MESSAGE_LENGTH = 2000  # characters of an error that are told
LARGEST = float(np.finfo(np.float32).max)  # a score beyond it is infinite to whoever keeps float32
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "resource_exhausted", "failed to allocate")

_log = logging.getLogger(__name__)


def main(source: Connection, control: socket.socket, arena: Arena) -> None:
    """Run a worker process.

    Args:
        source: Brings the `ScorerSource`, once, when the process can already tell what is wrong with it.
        control: Brings the calls and takes the answers.
        arena: Brings the pixels.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    os.setsid()
    die_with_parent()
    keep_memory()
    channel = Channel(control)
    try:
        told = cast(ScorerSource, source.recv())
        source.close()
        scorer = told.factory(**told.options)
        info = scorer.describe()
    except Exception as error:
        _log.exception("the model cannot be made")
        channel.write({"kind": "failed", "message": explain(error)})
        return
    channel.write({"kind": "ready", "info": info.model_dump(mode="json")})
    while (message := channel.read()) is not None:
        if message["do"] == "ping":
            channel.write({"kind": "pong", "call": message["call"]})
            continue
        samples = read_samples(message, arena, borrow=told.borrows)
        answer = score(scorer, samples, last=len(samples) == 1 or info.groupwise)
        del samples
        channel.write({"call": message["call"], **answer})


def die_with_parent() -> None:
    """Let the kernel end this process and its group as soon as the parent's end of a pipe is closed.

    A thread that waits for it would not run while the model's code holds the interpreter.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("a worker runs in a process that multiprocessing has started")
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    if sys.platform == "linux":
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)  # elsewhere it is SIGIO, which ends a process too
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # it ended before the kernel knew
        os._exit(1)


def read_samples(message: Mapping[str, Any], arena: Arena, *, borrow: bool) -> list[Sample]:
    """Return the samples of a call."""
    prompts = message["prompts"]
    media = arena.take(message["layouts"], len(prompts), size=message["size"], used=message["used"], borrow=borrow)
    metas = message["metas"] or [None] * len(prompts)
    return [
        Sample(prompt=prompt, meta=meta, **fields) for prompt, meta, fields in zip(prompts, metas, media, strict=True)
    ]


def score(scorer: Scorer, samples: Sequence[Sample], *, last: bool) -> dict[str, Any]:
    """Call the model and tell what came of it.

    Args:
        scorer: The model.
        samples: B samples.
        last: Whether an error is final, and therefore logged, or followed by calls with parts of the batch.

    Returns:
        `kind`: "scores", "oom", or a code of the wire; then `message`, or `scores`, `components` and `failures`.
    """
    begun = time.perf_counter()
    try:
        answer = checked(*scorer.score(samples), count=len(samples))
    except WireError as error:
        answer = {"kind": error.code, "message": error.message[:MESSAGE_LENGTH]}
    except Exception as error:
        kind = "oom" if is_out_of_memory(error) else "scorer_error"
        answer = {"kind": kind, "message": explain(error)}
        if last and kind == "scorer_error":
            _log.exception("the model failed")
    if answer["kind"] == "oom":  # only now has Python let go of the error and of the frames that held the memory
        empty_caches()
    return {**answer, "seconds": time.perf_counter() - begun}


def checked(
    scores: Sequence[Any],
    components: Mapping[str, Sequence[Any]],
    failures: Mapping[int, str | WireError],
    *,
    count: int,
) -> dict[str, Any]:
    """Return a model's answer as it is told to the parent; a score that is not finite becomes null.

    Raises:
        WireError: `wrong_count`: there is not one score for each sample, or not one value in a component, or a failure
            is of no sample.
    """
    counts = {"scores": len(scores), **{f"the component {name!r}": len(each) for name, each in components.items()}}
    for what, found in counts.items():
        if found != count:
            raise WireError("wrong_count", f"{what}: {found} values for {count} samples; return exactly one for each")
    for place in failures:
        if not 0 <= place < count:
            raise WireError("wrong_count", f"failures: there is no sample {place} among {count}")
    floats = [None if place in failures else float(value) for place, value in enumerate(scores)]
    told: dict[str, list[str]] = {}
    for place, why in failures.items():
        code, text = (why.code, why.message) if isinstance(why, WireError) else ("scorer_error", why)
        told[str(place)] = [code, text[:MESSAGE_LENGTH]]
    return {
        "kind": "scores",
        "scores": [value if value is not None and abs(value) <= LARGEST else None for value in floats],
        "components": {name: [plain(value, name) for value in values] for name, values in components.items()},
        "failures": told,
    }


def plain(value: Any, name: str) -> Any:
    """Return a component's value as JSON can hold it; what is not finite becomes null.

    Raises:
        TypeError: It is of a type that JSON does not have.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case np.generic() | np.ndarray():
            return plain(value.tolist(), name)
        case Mapping():
            return {str(key): plain(each, name) for key, each in value.items()}
        case list() | tuple():
            return [plain(each, name) for each in value]
        case _:
            kinds = "None, bool, int, float, str, numpy, lists and dicts"
            raise TypeError(f"the component {name!r} holds {type(value).__name__}; return {kinds}")


def explain(error: BaseException) -> str:
    """Return what is told of an error."""
    return f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether less work at once may help, for any of the usual libraries."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        text = str(error).lower()
        if names & {"MemoryError", "OutOfMemoryError"}:
            return True
        if isinstance(error, RuntimeError) and any(phrase in text for phrase in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def empty_caches() -> None:
    """Give freed memory back to the device."""
    gc.collect()
    torch = sys.modules.get("torch")  # the model's business, if it is there; this package does not need it
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
