"""The queue, the budget and the estimates, without processes."""

import asyncio
import random
import time

import numpy as np
import pytest

from tests.serving.helpers import run
from tiltflow.serving.batcher import Budget, Entry, Pace, Queue, Unit, batches_until
from tiltflow.serving.jobs import Sample, Scored


def entry(prompt: str = "", *, side: int = 0, deadline: float = 60.0, closed: list[str] | None = None) -> Entry:
    """Return an entry for the running loop."""
    told: list[str] = [] if closed is None else closed
    sample = Sample(prompt=prompt, image=np.zeros((side, side, 3), np.uint8) if side else None)
    future = asyncio.get_running_loop().create_future()
    return Entry(sample, future, deadline=time.monotonic() + deadline, closed=lambda: told.append(prompt))


def unit(*entries: Entry, priority: int = 0, alone: bool = False) -> Unit:
    return Unit(entries, priority=priority, alone=alone)


def prompts(batch: list[Entry]) -> list[str]:
    return [entry.sample.prompt for entry in batch]


def test_the_count_follows_every_change() -> None:
    async def test() -> None:
        seen: list[tuple[int, int]] = []
        queue = Queue(lambda items, nbytes: seen.append((items, nbytes)))
        queue.push([unit(entry("a", side=2)), unit(entry("b", side=2))])
        queue.push([unit(entry("c", side=4), priority=3)])
        assert (queue.items, queue.nbytes) == seen[-1] == (3, 12 + 12 + 48)
        assert queue.ahead(0) == (3, 3) and queue.ahead(1) == queue.ahead(3) == (1, 1) and queue.ahead(4) == (0, 0)
        assert prompts(queue.pop(items=8, pixels=1000, tokens=1000)) == ["c"]
        assert seen[-1] == (2, 24)
        assert prompts(list(queue.clear())) == ["a", "b"]
        assert (queue.items, queue.nbytes) == seen[-1] == (0, 0) and queue.ahead(0) == (0, 0)
        assert queue.pop(items=8, pixels=1000, tokens=1000) == []

    run(test())


def test_the_first_in_line_goes_even_beyond_the_limits() -> None:
    async def test() -> None:
        queue = Queue(lambda items, nbytes: None)
        queue.push([unit(entry("big", side=10)), unit(entry("next", side=10))])
        assert prompts(queue.pop(items=8, pixels=5, tokens=1000)) == ["big"]
        assert prompts(queue.pop(items=8, pixels=5, tokens=1000)) == ["next"]

    run(test())


def test_what_nobody_wants_is_finished_with_once() -> None:
    async def test() -> None:
        closed: list[str] = []
        queue = Queue(lambda items, nbytes: None)
        late, cancelled, wanted = (entry(name, closed=closed) for name in ("late", "cancelled", "wanted"))
        late.deadline = time.monotonic() - 1
        cancelled.future.cancel()
        queue.push([unit(late), unit(cancelled), unit(wanted)])
        queue.purge()
        assert queue.items == 1 and sorted(closed) == ["cancelled", "late"]
        error = late.future.result().error
        assert error is not None and error.code == "deadline_exceeded"
        assert prompts(queue.pop(items=8, pixels=1000, tokens=1000)) == ["wanted"]
        for _ in range(2):
            wanted.settle(Scored(score=1.0))
        assert closed.count("wanted") == 1 and wanted.future.result().score == 1.0

    run(test())


@pytest.mark.parametrize("seed", range(20))
def test_every_unit_comes_out_once_whole_in_order_and_within_the_limits(seed: int) -> None:
    async def test() -> None:
        chance = random.Random(seed)
        queue = Queue(lambda items, nbytes: None)
        units = {}
        for number in range(chance.randrange(1, 80)):
            group = chance.random() < 0.2
            count = chance.randrange(1, 6) if group else 1
            entries = [entry(str(number), side=chance.choice([2, 4])) for _ in range(count)]
            units[number] = unit(*entries, priority=chance.randrange(3), alone=group)
            queue.push([units[number]])
        popped: list[int] = []
        while batch := queue.pop(items=7, pixels=60, tokens=1000):
            numbers = list(dict.fromkeys(int(prompt) for prompt in prompts(batch)))
            assert batch == [each for number in numbers for each in units[number].entries]
            keys = {units[number].key for number in numbers}
            assert len(keys) == 1
            if None in keys:
                assert len(numbers) == 1
            else:
                assert len(batch) <= 7 and sum(each.pixels for each in batch) <= 60
            waiting = set(units) - set(popped)
            first = min(waiting, key=lambda number: (-units[number].priority, number))
            assert numbers[0] == first
            order = [(-units[number].priority, number) for number in numbers]
            assert order == sorted(order)
            popped += numbers
        assert sorted(popped) == sorted(units) and queue.items == queue.nbytes == 0

    run(test())


def test_a_budget_is_halved_and_grows_back_by_one() -> None:
    async def test() -> None:
        budget = Budget(items=16, pixels=1600, tokens=16_000)
        batch = [entry(side=4) for _ in range(12)]
        assert (budget.items, budget.pixels) == (16, 1600) and budget.fits(batch)
        budget.halve(batch)
        assert (budget.items, budget.pixels) == (6, 600) and not budget.fits(batch) and budget.fits(batch[:6])
        budget.grow()
        assert (budget.items, budget.pixels) == (7, 700)
        for _ in range(20):
            budget.grow()
        assert (budget.items, budget.pixels) == (16, 1600)
        budget.halve([entry(side=30)])  # few, but large: 900 of 1600 pixels
        assert (budget.items, budget.pixels) == (4, 450)
        for _ in range(5):
            budget.halve([entry(side=4)])
        assert (budget.items, budget.pixels) == (1, 100)

    run(test())


def test_the_pace_is_a_running_average_without_the_warm_up() -> None:
    pace = Pace()
    assert pace.until_done(batches=5, running=[0.0], replicas=1) == 0.0
    pace.add(30.0)
    assert pace.seconds == 30.0
    pace.add(0.1)
    assert pace.seconds == pytest.approx(0.1)
    pace.add(0.3)
    assert pace.seconds == pytest.approx(0.2)
    for _ in range(200):
        pace.add(0.5)
    assert pace.seconds == pytest.approx(0.5)
    assert pace.until_done(batches=1, running=[], replicas=1) == 0.0  # idle: only a try can tell
    assert pace.until_done(batches=4, running=[0.1], replicas=1) == pytest.approx(1.25 * (4 * 0.5 + 0.4), rel=1e-3)
    assert pace.until_done(batches=4, running=[0.1, 0.7], replicas=2) == pytest.approx(1.25 * 1.2, rel=1e-3)
    assert pace.until_done(batches=1, running=[0.1], replicas=2) == 0.0


def test_a_pace_that_varies_is_given_a_margin() -> None:
    steady, varied = Pace(), Pace()
    for number in range(100):
        steady.add(0.2)
        varied.add(0.1 if number % 2 else 0.3)
    ahead = {"batches": 9, "running": [0.0], "replicas": 1}
    assert steady.until_done(**ahead) == pytest.approx(1.25 * 2.0, rel=0.01)
    assert 2.8 < varied.until_done(**ahead) < 4.0


def test_doubt_brings_every_estimate_down() -> None:
    pace = Pace()
    for number in range(60):  # small and full batches by turns
        pace.add(0.1 if number % 2 else 1.1)
    assert pace.until_done(batches=4, running=[], replicas=1) > 4.0
    for _ in range(40):
        pace.doubt()
    assert pace.until_done(batches=4, running=[], replicas=1) < 0.01


def test_batches_until_a_new_sample_is_done() -> None:
    def calls(items: int, units: int, count: int, groups: int, *, groupwise: bool = False) -> int:
        return batches_until(items, units, count=count, groups=groups, batch_size=4, groupwise=groupwise)

    assert [calls(items, 0, 1, 0) for items in (0, 3, 4, 7, 8)] == [1, 1, 2, 2, 3]
    assert [calls(0, 0, count, 0) for count in (1, 4, 5, 64)] == [1, 1, 2, 16]  # to the end of the request
    assert calls(40, 3, 24, 2, groupwise=True) == 5


def test_a_batch_has_a_limit_of_tokens() -> None:
    async def test() -> None:
        queue = Queue(lambda items, nbytes: None)
        queue.push([unit(entry(letter * 40)) for letter in "abcd"])  # ten tokens each
        found = [prompts(queue.pop(items=8, pixels=0, tokens=25)) for _ in range(2)]
        assert found == [["a" * 40, "b" * 40], ["c" * 40, "d" * 40]]

    run(test())


def test_a_budget_of_tokens_is_halved_too() -> None:
    async def test() -> None:
        budget = Budget(items=16, pixels=1600, tokens=160)
        batch = [entry("x" * 40) for _ in range(8)]
        assert budget.fits(batch)
        budget.halve(batch)
        assert (budget.items, budget.tokens) == (4, 40) and not budget.fits(batch) and budget.fits(batch[:4])

    run(test())
