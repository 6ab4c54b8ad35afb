"""A served model over real worker processes: every sample is answered, and by the right score."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.helpers import ask, calls, codes, run, serving, submit, until
from tests.serving.scorers import Hungry, Keeper, Odd, Plain, Whole, Writer
from tiltflow.serving.jobs import Sample
from tiltflow.serving.metrics import NoMetrics
from tiltflow.serving.wire import Limits, WireError


class Counting(NoMetrics):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.reasons: list[str] = []
        self.waits: list[float] = []
        self.queued: list[tuple[int, int]] = []
        self.states: list[str] = []
        self.nonfinites = 0

    def batch(self, model: str, size: int, seconds: float) -> None:
        assert model == "m" and seconds > 0
        self.sizes.append(size)

    def queue_wait(self, model: str, seconds: float) -> None:
        self.waits.append(seconds)

    def queue(self, model: str, items: int, size: int) -> None:
        self.queued.append((items, size))

    def shed(self, model: str, reason: str) -> None:
        self.reasons.append(reason)

    def nonfinite(self, model: str) -> None:
        self.nonfinites += 1

    def state(self, model: str, state: str) -> None:
        self.states.append(state)


def picture(level: int, side: int = 8) -> Sample:
    return Sample(image=np.full((side, side, 3), level, np.uint8))


def test_scores_come_back_in_order_and_in_full_batches() -> None:
    async def test() -> None:
        metrics = Counting()
        async with serving(batch_size=16, metrics=metrics) as model:
            answers = await ask(model, [picture(level) for level in range(40)])
            assert [answer.score for answer in answers] == list(range(40))
            assert [answer.batch_size for answer in answers] == [16] * 32 + [8] * 8
            assert all(answer.queue_ms >= 0 and answer.compute_ms > 0 for answer in answers)
            assert model.info.name == "m" and model.info.revision == "r1"
            assert model.info.state == model.state == "READY" and model.info.batch_size == 16
            assert await ask(model, []) == []
        assert metrics.sizes == [16, 16, 8]
        assert len(metrics.waits) == 40
        assert (40, 40 * 8 * 8 * 3) in metrics.queued and metrics.queued[-1] == (0, 0)
        assert metrics.states == ["LOADING", "READY", "DRAINING"]

    run(test())


def test_all_fields_arrive_whatever_their_shapes() -> None:
    values = np.random.default_rng(0)
    levels = values.integers(0, 255, (9, 7, 3), np.uint8)
    floats = values.random((2, 3, 4, 5), np.float32)
    sample = Sample(
        prompt="ein grünes Haus \ud800 🏠",
        image=levels[::-1, ::2],  # not contiguous
        video=floats,
        condition_images=[levels, floats[0].astype(">f4")],
        condition_videos=[],
        meta={"tag": ["a", {"b": None}], "n": 1.5},
    )

    def told(array: Any) -> list[Any]:
        return [array.dtype.newbyteorder("=").str, list(array.shape), float(array.astype(np.float64).sum())]

    async def test(borrows: bool) -> None:
        async with serving(Whole, borrows=borrows) as model:
            [answer] = await ask(model, [sample])
            assert answer.components["given"] == {
                "prompt": sample.prompt,
                "meta": sample.meta,
                "image": told(levels[::-1, ::2]),
                "video": told(floats),
                "condition_images": [told(levels), told(floats[0])],
                "condition_videos": [],
            }
            assert [answer.components["given"]["image"] for answer in await ask(model, ["text only"])] == [None]
            metas = [None, {}, {"a": {}}]
            answers = await ask(model, [Sample(prompt="p", meta=meta) for meta in metas])
            assert [answer.components["given"]["meta"] for answer in answers] == metas

    run(test(borrows=False))
    run(test(borrows=True))


def test_large_and_growing_batches() -> None:
    async def test() -> None:
        async with serving() as model:
            for side, count in ((16, 2), (2048, 5), (64, 9), (3000, 1), (512, 64)):
                answers = await ask(model, [picture(level, side) for level in range(count)])
                assert [answer.score for answer in answers] == list(range(count))

    run(test())


def test_a_model_that_keeps_its_pictures_sees_them_unchanged() -> None:
    async def test() -> None:
        async with serving(Keeper) as model:
            for level in (3, 9, 200, 4):
                assert [answer.score for answer in await ask(model, [picture(level)])] == [3]

    run(test())


@pytest.mark.parametrize("borrows", [False, True])
def test_borrowed_pictures_are_read_only(borrows: bool) -> None:
    async def test() -> None:
        async with serving(Writer, borrows=borrows) as model:
            [answer] = await ask(model, [picture(5)])
            if borrows:
                assert answer.error is not None and "read-only" in answer.error.message
            else:
                assert answer.score == 0

    run(test())


def test_one_batch_has_one_shape() -> None:
    async def test() -> None:
        metrics = Counting()
        async with serving(metrics=metrics) as model:
            samples = [picture(level, 8 if level % 2 else 4) for level in range(20)] + [Sample(prompt="7")]
            answers = await ask(model, samples)
            assert [answer.score for answer in answers] == [*range(20), 7]
        assert metrics.sizes == [10, 10, 1]

    run(test())


def test_pixels_limit_a_batch_and_a_sample() -> None:
    async def test() -> None:
        metrics = Counting()
        async with serving(batch_pixels=10 * 8 * 8 + 1, metrics=metrics) as model:
            assert len(await ask(model, [picture(1)] * 25)) == 25
            assert metrics.sizes == [10, 10, 5]
            with pytest.raises(WireError, match="larger batch_pixels") as caught:
                submit(model, [picture(1), picture(1, 64)])
            assert caught.value.code == "invalid_item" and caught.value.param == "items[1]"
            assert model.queue_items == 0

    run(test())


def test_one_poisoned_sample_of_64(tmp_path: Path) -> None:
    async def test() -> None:
        log = tmp_path / "calls"
        async with serving(options={"log": str(log)}) as model:
            answers = await ask(model, [str(place) if place != 41 else "poison" for place in range(64)])
            assert codes(answers) == [""] * 41 + ["scorer_error"] + [""] * 22
            assert [answer.score for answer in answers if answer.error is None] == [n for n in range(64) if n != 41]
            assert answers[41].error is not None
            assert answers[41].error.message == "ValueError: this one cannot be scored"
        assert len(calls(log)) == 13  # the whole, then both halves at each of 6 levels

    run(test())


def test_a_reason_that_the_model_names_holds_for_the_whole_call(tmp_path: Path) -> None:
    async def test() -> None:
        log = tmp_path / "calls"
        async with serving(options={"log": str(log)}) as model:
            answers = await ask(model, ["1", "judge", "2"])
            assert codes(answers) == ["upstream_judge"] * 3
            assert answers[0].error is not None and answers[0].error.status == 502
        assert len(calls(log)) == 1

    run(test())


def test_odd_answers_are_errors_and_never_scores() -> None:
    async def test() -> None:
        metrics = Counting()
        async with serving(Odd, metrics=metrics) as model:
            for first in ("short", "long", "short component", "failure of nobody"):
                metrics.sizes.clear()
                assert codes(await ask(model, [first, "b", "c"])) == ["wrong_count"] * 3
                assert metrics.sizes == [3]
            answers = await ask(model, ["not finite", "b", "c", "d"])
            assert codes(answers) == ["nonfinite_score"] * 3 + [""] and metrics.nonfinites == 3
            assert answers[3].score == 3
            assert codes(await ask(model, ["text"])) == ["scorer_error"]
            [strange] = await ask(model, ["strange component"])
            assert strange.error is not None and "'object' holds object" in strange.error.message
            answers = await ask(model, ["failures", "b", "c"])
            assert codes(answers) == ["scorer_error", "upstream_judge", ""]
            assert [answer.error and answer.error.message for answer in answers] == [
                "no face",
                "the judge is out",
                None,
            ]
            answers = await ask(model, ["components", "b"])
            assert [answer.components for answer in answers] == [
                {"boxes": [[0.0, 0.0]], "odds": None},
                {"boxes": [[1.0, 1.0]], "odds": None},
            ]
            assert codes(await ask(model, ["fine"])) == [""]

    run(test())


def test_too_little_memory_halves_the_batches_and_they_grow_back(tmp_path: Path) -> None:
    async def test() -> None:
        log, metrics = tmp_path / "calls", Counting()
        async with serving(Hungry, options={"most": 20, "log": str(log)}, metrics=metrics) as model:
            answers = await ask(model, [str(place) for place in range(64)])
            assert [answer.score for answer in answers] == list(range(64))
            assert metrics.sizes == [64, 32, 16, 16, 16, 16]
            metrics.sizes.clear()
            assert codes(await ask(model, ["1"] * 200)) == [""] * 200
            assert metrics.sizes[0] == 20  # one more after each of the four good calls
            assert max(metrics.sizes) == 21 and min(metrics.sizes) >= 5  # 21 fail and are halved
            metrics.sizes.clear()
            answers = await ask(model, ["huge"])
            assert codes(answers) == ["scorer_error"] and metrics.sizes == [1, 1]  # tried again once
            assert answers[0].error is not None and "out of memory" in answers[0].error.message

    run(test())


def test_groups_are_never_split_nor_mixed(tmp_path: Path) -> None:
    async def test() -> None:
        log = tmp_path / "calls"
        options = {"log": str(log), "groupwise": True}
        async with serving(options=options, batch_size=4, batch_pixels=1000) as model:
            names = ["a", "b", "a", "b", "c", "a", "a", "a"]
            samples = [
                Sample(prompt=name + str(place), group=name, image=np.zeros((1 + place, 2, 3), np.uint8))
                for place, name in enumerate(names)
            ]
            assert codes(await ask(model, samples)) == [""] * 8
            assert calls(log) == [["a0", "a2", "a5", "a6", "a7"], ["b1", "b3"], ["c4"]]
            poisoned = [Sample(prompt=prompt, group="d") for prompt in ("1", "poison", "2")]
            assert codes(await ask(model, poisoned)) == ["scorer_error"] * 3
            assert calls(log)[3:] == [["1", "poison", "2"]]
            with pytest.raises(WireError, match="group_id") as caught:
                submit(model, [Sample(group="x"), Sample()])
            assert caught.value.code == "invalid_item" and caught.value.param == "items[1].group_id"
            with pytest.raises(WireError, match="the group of 3 samples has 1200 pixels"):
                submit(model, [Sample(group="x", image=np.zeros((20, 20, 3), np.uint8))] * 3)
            # one of a group is not wanted any more: the others are still compared with it; then none of it is wanted
            go = tmp_path / "go"
            blocker = submit(model, [Sample(prompt=f"until={go}", group="s")])
            await until(lambda: model.queue_items == 0)
            half = submit(model, [Sample(prompt="h1", group="h"), Sample(prompt="h2", group="h")])
            none = submit(model, [Sample(prompt="n1", group="n"), Sample(prompt="n2", group="n")])
            for future in (half[0], *none):
                future.cancel()
            go.touch()
            assert codes(await asyncio.gather(*blocker, half[1])) == ["", ""]
            assert calls(log)[4:] == [[f"until={go}"], ["h1", "h2"]]

    run(test())


def test_priorities_then_age(tmp_path: Path) -> None:
    async def test() -> None:
        log, go = tmp_path / "calls", tmp_path / "go"
        async with serving(options={"log": str(log)}, batch_size=2) as model:
            first = submit(model, [f"until={go}"])
            await until(lambda: model.queue_items == 0)
            low = submit(model, ["l1", "l2", "l3"], priority=-1)
            normal = submit(model, ["n1", "n2"])
            high = submit(model, ["h1", "h2", "h3"], priority=5)
            go.touch()
            await asyncio.gather(*first, *low, *normal, *high)
        expected = [[f"until={go}"], ["h1", "h2"], ["h3", "n1"], ["n2", "l1"], ["l2", "l3"]]
        assert calls(log) == expected

    run(test())


def test_cancelled_and_expired_samples_are_dropped_before_compute(tmp_path: Path) -> None:
    async def test() -> None:
        log, go = tmp_path / "calls", tmp_path / "go"
        async with serving(options={"log": str(log)}) as model:
            first = submit(model, [f"until={go}"])
            await until(lambda: model.queue_items == 0)
            wanted = submit(model, ["w"])
            for future in submit(model, ["c1", "c2"]):
                future.cancel()
            expiring = submit(model, ["e1", "e2"], seconds=0.1)
            # at the deadline, not when the model is free
            assert codes(await asyncio.gather(*expiring)) == ["deadline_exceeded"] * 2
            assert model.queue_items == 1  # what expired takes no place, and what was cancelled went with it
            go.touch()
            assert codes(await asyncio.gather(*first, *wanted)) == ["", ""]
            with pytest.raises(WireError, match="deadline passed") as caught:
                submit(model, ["late"], seconds=-0.1)
            assert caught.value.code == "deadline_exceeded"
        assert calls(log) == [[f"until={go}"], ["w"]]

    run(test())


def test_a_full_queue_sheds_at_once_all_or_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        metrics, go = Counting(), tmp_path / "go"
        async with serving(limits=Limits(queue_items=10), metrics=metrics) as model:
            first = submit(model, [f"until={go}"])
            await until(lambda: model.queue_items == 0)
            waiting = submit(model, ["1"] * 8)
            for _ in range(100):
                with pytest.raises(WireError, match="8 of 10 places") as caught:
                    submit(model, ["2"] * 3)
            assert caught.value.code == "overloaded" and caught.value.status == 429
            assert caught.value.retry_after_ms and caught.value.retry_after_ms >= 50
            assert model.queue_items == 8 and metrics.reasons == ["queue_full"] * 100
            for future in waiting[:4]:
                future.cancel()
            more = submit(model, ["2"] * 6)  # the places of the cancelled are free
            assert model.queue_items == 10
            with pytest.raises(WireError, match="send fewer") as caught:
                submit(model, ["2"] * 11)
            assert caught.value.code == "invalid_request"
            go.touch()
            assert codes(await asyncio.gather(*first, *waiting[4:], *more)) == [""] * 11

    run(test())


def test_sheds_what_would_come_too_late(tmp_path: Path) -> None:
    async def test() -> None:
        metrics, go = Counting(), tmp_path / "go"
        async with serving(options={"seconds": 0.1}, batch_size=1, metrics=metrics) as model:
            model._pace.add(0.1)  # as if it were measured, on a machine that does nothing else
            model._pace._spread = 0.0
            waiting = submit(model, [f"until={go}", *["1"] * 9])
            await until(lambda: model.queue_items == 9)
            with pytest.raises(WireError, match=r"would need about 1\.\d s and the deadline is in 0.5 s") as caught:
                submit(model, ["2"], seconds=0.5)
            assert caught.value.code == "overloaded"
            assert 400 <= (caught.value.retry_after_ms or 0) <= 2400
            assert metrics.reasons == ["too_slow"]
            assert model._estimate(1, 1, 1) < model._estimate(1, 1, 0) / 2  # it waits for the running batch only
            go.touch()
            assert codes(await ask(model, ["3"], priority=1)) == [""]
            assert not all(future.done() for future in waiting)
            for future in waiting:
                future.cancel()
            assert codes(await ask(model, ["4"])) == [""]  # nobody waits for those any more

    run(test())


@pytest.mark.slow
def test_overload_keeps_the_admitted_within_their_deadline() -> None:
    async def test() -> None:
        served, shed, late = 0, 0, 0
        async with serving(options={"seconds": 0.05}, batch_size=4, limits=Limits(queue_items=64)) as model:
            await ask(model, ["1"])

            async def client() -> None:
                nonlocal served, shed, late
                end = time.monotonic() + 2.5
                while time.monotonic() < end:
                    try:
                        [answer] = await ask(model, ["1"], seconds=0.6)
                    except WireError as error:
                        assert error.code == "overloaded"
                        shed += 1
                        await asyncio.sleep(0.02)
                        continue
                    served += answer.error is None
                    late += answer.error is not None

            await asyncio.gather(*(client() for _ in range(100)))
        assert shed > 0 and served > 50
        assert late <= 0.05 * served, (served, late, shed)  # 1% on a machine that does nothing else

    run(test())


def test_two_replicas_share_the_queue(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(replicas=2, batch_size=1, options={"seconds": 0.2}) as model:
            await until(lambda: all(lane.state == "READY" for lane in model._lanes))
            answers = submit(model, ["1"] * 6)
            await until(lambda: all(lane.busy_since is not None for lane in model._lanes))
            assert not any(future.done() for future in answers) and model.queue_items == 4
            assert codes(await asyncio.gather(*answers)) == [""] * 6

    run(test())


def test_drains_before_it_stops() -> None:
    async def test() -> None:
        async with serving(options={"seconds": 0.1}, batch_size=1) as model:
            waiting = submit(model, ["1"] * 3)
            stopping = asyncio.create_task(model.stop(drain_seconds=10))
            await asyncio.sleep(0)
            assert model.state == "DRAINING"
            with pytest.raises(WireError) as caught:
                submit(model, ["2"])
            assert caught.value.code == "draining" and caught.value.retryable
            assert codes(await asyncio.gather(*waiting)) == [""] * 3
            begun = time.monotonic()
            await stopping
            assert time.monotonic() - begun < 1.5
            with pytest.raises(WireError, match="stopping"):
                await model.wait_ready()

    run(test())


def test_what_is_not_finished_by_the_end_of_the_drain_is_told() -> None:
    async def test() -> None:
        async with serving(batch_size=1) as model:
            waiting = submit(model, ["1", "sleep=5", "2"])
            await asyncio.wait(waiting, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            begun = time.monotonic()
            await model.stop(drain_seconds=0.2)
            assert time.monotonic() - begun < 3.0
            assert codes(await asyncio.gather(*waiting)) == ["", "draining", "draining"]

    run(test())


def test_a_sample_that_cannot_be_sent_fails_alone() -> None:
    async def test() -> None:
        async with serving() as model:
            [answer] = await ask(model, [Sample(meta={"key": object()})])
            assert answer.error is not None and answer.error.code == "internal_error"
            assert codes(await ask(model, ["1"])) == [""]

    run(test())


def test_an_empty_sample_waits_for_nothing() -> None:
    async def test() -> None:
        async with serving() as model:
            took = []
            for _ in range(300):
                begun = time.perf_counter()
                await ask(model, ["1"])
                took.append(time.perf_counter() - begun)
            # One in ten takes half a millisecond on a machine that does nothing else; this catches waits, not load.
            assert sorted(took)[30] < 0.01

    run(test())


@pytest.mark.parametrize("field", ["replicas", "batch_size", "batch_pixels"])
def test_a_setting_below_one_is_refused(field: str) -> None:
    async def test() -> None:
        with pytest.raises(WireError, match=f"{field} is 0; it must be 1 or more"):
            async with serving(Plain, **{field: 0}):
                pass

    run(test())


def test_a_request_is_admitted_by_its_end_and_an_idle_model_comes_to_doubt_its_estimate() -> None:
    async def test() -> None:
        async with serving(options={"seconds": 0.05}, batch_size=1) as model:
            for _ in range(4):
                await ask(model, ["1"])
            with pytest.raises(WireError) as caught:
                submit(model, ["1"] * 64, seconds=1.0)
            assert caught.value.code == "overloaded"
            for _ in range(40):  # nothing else would ever show that the model has become quicker
                try:
                    waiting = submit(model, ["1"] * 64, seconds=1.0)
                    break
                except WireError:
                    continue
            else:
                raise AssertionError("it never tried again")
            for future in waiting:
                future.cancel()

    run(test())


def test_tokens_limit_a_sample() -> None:
    async def test() -> None:
        async with serving(batch_tokens=10) as model:
            assert model.info.batch_tokens == 10
            assert codes(await ask(model, ["x" * 40])) == [""]
            with pytest.raises(WireError, match="has 11 tokens, more than the 10 that m takes"):
                submit(model, ["x" * 41])

    run(test())
