"""Memory that a large batch took once does not stay taken."""

import os
import sys

import numpy as np
import pytest

from tests.serving.helpers import ask, run, serving
from tests.serving.scorers import Converter
from tiltflow.runtime.malloc import is_glibc
from tiltflow.serving.jobs import Sample
from tiltflow.serving.memory import LOOK_EVERY, SPARE, Arena

MIB = 2**20


def batch(mib: int) -> list[Sample]:
    return [Sample(image=np.full((mib, MIB // 3, 3), level, np.uint8)) for level in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux frees the pages of a mapped file")
def test_pages_that_no_batch_has_needed_for_long_go_back() -> None:
    arena = Arena.create()
    descriptor = arena._descriptor  # pyright: ignore[reportPrivateUsage]

    def taken() -> int:
        return os.fstat(descriptor).st_blocks * 512

    arena.put(batch(40))
    assert taken() >= 78 * MIB
    for _ in range(2 * LOOK_EVERY):
        layouts = arena.put(batch(1))
    assert taken() < 4 * MIB
    found = arena.take(layouts, 2, size=arena.size, used=arena.used, borrow=True)
    assert [each["image"].max() for each in found] == [0, 1]
    arena.put(batch(40))  # grows again in the same mapping
    assert taken() >= 78 * MIB
    arena.close()


def test_a_copy_does_not_keep_more_than_it_needs() -> None:
    arena = Arena.create()
    for mib in (40, *[1] * (2 * LOOK_EVERY)):
        layouts = arena.put(batch(mib))
        found = arena.take(layouts, 2, size=arena.size, used=arena.used, borrow=False)
        assert [each["image"].max() for each in found] == [0, 1]
        del found
    assert len(arena._copy) < SPARE  # pyright: ignore[reportPrivateUsage]
    arena.close()


@pytest.mark.skipif(not is_glibc(), reason="only glibc is told what to do with freed memory")
def test_a_worker_uses_freed_memory_again() -> None:
    async def test() -> None:
        pictures = [Sample(image=np.zeros((512, 512, 3), np.uint8)) for _ in range(8)]
        async with serving(Converter, borrows=True) as model:
            for _ in range(3):
                answers = await ask(model, pictures)
            pages = 8 * 512 * 512 * 4 // os.sysconf("SC_PAGE_SIZE")  # Pillow takes four bytes a pixel
            faults = answers[0].score
            assert faults is not None and faults < pages / 10, "a new page for each 4 KiB of every picture"

    run(test())
