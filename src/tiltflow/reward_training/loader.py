"""Reads and decodes batches ahead of the step that needs them."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.reward_training.base import Batch, Examples
from tiltflow.reward_training.batches import MicroBatch, Step


class LoadedStep(NamedTuple):
    """A step's micro-batches, or why they could not be read."""

    number: int
    batches: list[Batch]
    error: Exception | None


def load_steps(
    examples: Examples, steps: Iterable[Step], *, device: torch.device, workers: int, prefetch: int
) -> Iterator[LoadedStep]:
    """Yield steps in order, their tensors on the device.

    Args:
        examples: Read in threads where there are workers: `batch` must not depend on the order of its calls.
        steps: What to read.
        device: Where the model is.
        workers: Threads; 0 reads when the step is due.
        prefetch: How many micro-batches may be ahead.

    Yields:
        A step at a time. A failure is handed on instead of raised, so that the processes can agree on it.
    """
    if workers == 0:
        for step in steps:
            yield _finished(step.number, [lambda m=micro: _read(examples, m, device) for micro in step.micro_batches])
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="examples") as pool:
        waiting: deque[tuple[int, list[Future[Batch]]]] = deque()
        try:
            for step in steps:
                futures = [pool.submit(_read, examples, micro, device) for micro in step.micro_batches]
                waiting.append((step.number, futures))
                while waiting and sum(len(ahead) for _, ahead in waiting) - len(waiting[0][1]) >= prefetch:
                    number, ready = waiting.popleft()
                    yield _finished(number, [future.result for future in ready])
            while waiting:
                number, ready = waiting.popleft()
                yield _finished(number, [future.result for future in ready])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def to_device(value: Any, device: torch.device) -> Any:
    """Return a batch, or what is in one, with its tensors on a device; what is no tensor stays."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def _read(examples: Examples, micro: MicroBatch, device: torch.device) -> Batch:
    batch = dict(examples.batch(micro.places, micro.weights))
    return _pinned(batch) if device.type == "cuda" else batch


def _pinned(value: Any) -> Any:
    """Return a batch whose tensors the GPU can fetch while it computes."""
    if isinstance(value, Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    if isinstance(value, dict):
        return {key: _pinned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_pinned(item) for item in value)
    return value


def _finished(number: int, parts: list[Any]) -> LoadedStep:
    try:
        return LoadedStep(number, [part() for part in parts], None)
    except Exception as error:  # a file may be unreadable in any way; the trainer raises it on every process
        return LoadedStep(number, [], error)
