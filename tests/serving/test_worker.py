"""What a worker does with a model's answer, and the memory and frames it shares with its parent."""

import json
import os
import socket

import numpy as np
import pytest

from tiltflow.serving.frames import Channel, Frames, frame
from tiltflow.serving.jobs import Sample
from tiltflow.serving.memory import PAGE, Arena
from tiltflow.serving.wire import WireError
from tiltflow.serving.worker import LARGEST, checked, is_out_of_memory, plain


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def chained() -> Exception:
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("the model failed") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying"), True),
        (chained(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (KeyError("image"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_scores_keep_every_bit_and_null_stands_for_what_is_not_finite() -> None:
    scores = np.random.default_rng(0).standard_normal(100).astype(np.float32) * np.float32(1e-3)
    answer = json.loads(json.dumps(checked(scores, {}, {}, count=100)))
    assert (np.array(answer["scores"], np.float32) == scores).all()
    odd = [float("nan"), float("-inf"), LARGEST, 2 * LARGEST, -3, True]
    assert checked(odd, {}, {}, count=6)["scores"] == [None, None, LARGEST, None, -3.0, 1.0]


def test_a_failure_needs_no_score() -> None:
    answer = checked([1.0, None], {}, {1: "no face"}, count=2)
    assert answer["scores"] == [1.0, None] and answer["failures"] == {"1": ["scorer_error", "no face"]}
    with pytest.raises(TypeError):
        checked([1.0, None], {}, {}, count=2)


def test_a_missing_value_is_a_wrong_count() -> None:
    for scores, components, failures in (([], {}, {}), ([1.0] * 3, {}, {}), ([1.0] * 2, {"a": [1]}, {})):
        with pytest.raises(WireError, match="values for 2 samples") as caught:
            checked(scores, components, failures, count=2)
        assert caught.value.code == "wrong_count"


def test_components_become_plain() -> None:
    given = {"box": np.arange(4, dtype=np.int64), "p": np.float32(0.5), 3: (float("inf"), None, [True, "x"])}
    assert plain(given, "c") == {"box": [0, 1, 2, 3], "p": 0.5, "3": [None, None, [True, "x"]]}
    with pytest.raises(TypeError, match="the component 'c' holds set"):
        plain([{1}], "c")


def test_frames_come_whole_however_they_are_cut() -> None:
    messages = [{"a": "ü\ud800" * 100}, {}, {"b": [1.5, None]}]
    content = b"".join(map(frame, messages))
    for step in (1, 7, len(content)):
        frames = Frames()
        found = [m for at in range(0, len(content), step) for m in frames.feed(content[at : at + step])]
        assert found == messages


def test_a_channel_reads_until_its_other_end_is_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, other = Channel(ours), Channel(theirs)
        other.write({"n": 1})
        other.write({"n": 2})
        theirs.close()
        assert [channel.read(), channel.read(), channel.read()] == [{"n": 1}, {"n": 2}, None]


def attached(arena: Arena) -> Arena:
    """Return the reader's end, as a worker process gets it."""
    return Arena(os.dup(arena._descriptor), writable=False)


def test_an_arena_passes_a_batch_and_is_used_again() -> None:
    writer = Arena.create()
    reader = attached(writer)
    first = [Sample(image=np.full((5, 3, 3), n, np.uint8)) for n in range(3)]
    layouts = writer.put(first)
    assert len(layouts) == 1 and writer.size == PAGE
    kept = reader.take(layouts, 3, size=writer.size, used=writer.used, borrow=False)
    assert [fields["image"].tolist() for fields in kept] == [sample.image.tolist() for sample in first]
    size = writer.size
    second = [Sample(image=np.full((5, 3, 3), 9, np.uint8)), Sample(video=np.ones((2, 3, 4, 4), np.float32))]
    layouts = writer.put(second)
    found = reader.take(layouts, 2, size=writer.size, used=writer.used, borrow=False)
    assert len(layouts) == 2 and found[0]["image"].max() == found[0]["image"].min() == 9
    assert found[0]["video"] is found[1]["image"] is None and (found[1]["video"] == 1).all()
    assert kept[2]["image"].max() == 2, "an array that is kept does not change"
    assert writer.size == size
    part = found[1]["video"][0, :, 1:]  # a view of a view keeps the memory too
    del found, kept
    again = reader.take(writer.put(first), 3, size=writer.size, used=writer.used, borrow=False)
    assert (part == 1).all()
    address = again[0]["image"].__array_interface__["data"][0]
    del again
    again = reader.take(writer.put(first), 3, size=writer.size, used=writer.used, borrow=False)
    assert again[0]["image"].__array_interface__["data"][0] == address, "nothing is kept: the same memory"
    for arena in (writer, reader):
        arena.close()
    assert (again[2]["image"] == 2).all()


def test_a_borrowed_array_is_read_only_and_grown_memory_is_found() -> None:
    writer = Arena.create()
    reader = attached(writer)
    for side in (4, 1200, 8):
        sample = Sample(image=np.full((side, side, 3), 7, np.uint8), condition_images=[np.zeros((2, 2, 3), np.uint8)])
        [fields] = reader.take(writer.put([sample]), 1, size=writer.size, used=writer.used, borrow=True)
        assert (fields["image"] == 7).all() and fields["condition_images"][0].shape == (2, 2, 3)
        with pytest.raises(ValueError, match="read-only"):
            fields["image"][:] = 0
    for arena in (writer, reader):
        arena.close()
