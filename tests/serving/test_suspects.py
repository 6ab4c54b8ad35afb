"""A sample that ends its worker is found, and costs the others one more try and the model nothing."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.serving.helpers import allow, ask, calls, codes, run, serving, until
from tiltflow.serving.jobs import Sample
from tiltflow.serving.models import ServedModel
from tiltflow.serving.suspects import KEPT_SECONDS, Suspects


def picture(level: int) -> Sample:
    return Sample(prompt="a", image=np.full((2, 2, 3), level, np.uint8))


def accuse(suspects: Suspects, units: Sequence[Sequence[Sample]]) -> bool:
    return asyncio.run(suspects.accuse(units))


async def recovered(model: ServedModel) -> None:
    """Wait until a lost worker has been replaced."""
    await until(lambda: model.state == "LOADING")
    await model.wait_ready()


def test_suspect_then_guilty_until_forgotten() -> None:
    now = 0.0
    suspects = Suspects(clock=lambda: now)
    first, second = [picture(1)], [picture(2)]
    assert suspects.standing(first) == "free"
    assert not accuse(suspects, [first, second])
    assert suspects.standing(first) == suspects.standing(second) == "suspect"
    assert suspects.standing([picture(3)]) == "free"
    assert not accuse(suspects, [first, second])  # not alone
    suspects.acquit(second)
    assert suspects.standing(second) == "free"
    assert accuse(suspects, [first])
    assert suspects.standing(first) == "guilty"
    now = KEPT_SECONDS
    assert suspects.standing(first) == "free"


def test_everything_that_the_model_sees_counts() -> None:
    suspects = Suspects()
    accuse(suspects, [[Sample(prompt="a", meta={"b": 1})]])
    assert suspects.standing([Sample(prompt="a", meta={"b": 1})]) == "suspect"
    for other in (Sample(prompt="a"), Sample(prompt="b", meta={"b": 1}), Sample(prompt="a", meta={"b": 2})):
        assert suspects.standing([other]) == "free"
    accuse(suspects, [[picture(1), picture(2)]])  # a group
    assert suspects.standing([picture(1), picture(2)]) == "suspect"
    assert suspects.standing([picture(1)]) == suspects.standing([picture(2), picture(1)]) == "free"


def test_a_sample_that_kills_its_worker_is_isolated_by_a_second_and_third_try(tmp_path: Path) -> None:
    async def test() -> None:
        log = tmp_path / "log"
        async with serving(options={"log": str(log)}) as model:
            prompts = [*map(str, range(7)), "die"]
            assert codes(await ask(model, prompts)) == ["worker_lost"] * 8
            await recovered(model)
            answers = await ask(model, prompts)  # each alone; what came before the bad one is scored
            assert codes(answers) == [""] * 7 + ["scorer_error"]
            assert answers[7].error is not None and not answers[7].error.retryable
            assert "second time with this sample" in answers[7].error.message
            await recovered(model)
            answers = await ask(model, prompts)  # the bad one does not reach the worker any more
            assert [answer.score for answer in answers[:7]] == list(range(7))
            assert codes(answers[7:]) == ["scorer_error"]
            assert calls(log) == [prompts, *([prompt] for prompt in prompts), prompts[:7]]
            assert model.state == "READY"

    run(test())


def test_samples_that_kill_do_not_fail_the_model() -> None:
    async def test() -> None:
        async with serving() as model:
            assert codes(await ask(model, ["die=1", "die=2", "die=3", "1"])) == ["worker_lost"] * 4
            for place in range(3):
                await recovered(model)
                assert codes(await ask(model, ["1"])) == [""]
                assert codes(await ask(model, [f"die={place + 1}"])) == ["scorer_error"]
            await recovered(model)
            assert codes(await ask(model, ["1"])) == [""]

    run(test())


def test_a_sample_that_hangs_is_isolated_too() -> None:
    async def test() -> None:
        async with serving() as model:
            for _ in range(2):
                allow(model, 0.4)
                found = codes(await ask(model, ["hang"]))
                allow(model)
                await recovered(model)
                assert codes(await ask(model, ["1"])) == [""]
            assert found == ["scorer_error"]

    run(test())


def test_a_sample_is_not_to_blame_for_those_that_its_model_asks() -> None:
    async def test() -> None:
        async with serving(remote=True) as model:
            for _ in range(2):
                allow(model, 0.4)
                answers = await ask(model, ["hang"])
                assert codes(answers) == ["deadline_exceeded"]
                assert answers[0].error is not None and answers[0].error.retryable
                await recovered(model)
            allow(model)
            assert codes(await ask(model, ["sleep=0.1", "1"])) == [""] * 2

    run(test())


def test_a_group_that_kills_is_refused_as_a_whole() -> None:
    async def test() -> None:
        async with serving(options={"groupwise": True}) as model:
            bad = [Sample(prompt="die", group="a"), Sample(prompt="1", group="a")]
            good = [Sample(prompt="2", group="b"), Sample(prompt="3", group="b")]
            assert codes(await ask(model, bad)) == ["worker_lost"] * 2
            await recovered(model)
            assert codes(await ask(model, good)) == [""] * 2
            assert codes(await ask(model, bad)) == ["scorer_error"] * 2
            await recovered(model)
            assert codes(await ask(model, bad)) == ["scorer_error"] * 2  # the worker does not see it
            assert model.state == "READY"
            assert codes(await ask(model, good)) == [""] * 2

    run(test())


def test_nothing_is_kept_of_what_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltflow.serving.suspects.KEPT", 3)
    suspects = Suspects()
    samples = [[Sample(prompt=str(number))] for number in range(5)]
    accuse(suspects, samples)
    assert [suspects.standing(sample) for sample in samples] == ["free"] * 2 + ["suspect"] * 3
    accuse(suspects, samples[4:])
    for sample in samples:
        suspects.acquit(sample)
    assert not suspects._known and not suspects._glances  # pyright: ignore[reportPrivateUsage]


def test_killers_one_after_the_other_do_not_fail_a_model_that_has_worked() -> None:
    async def test() -> None:
        async with serving() as model:
            assert codes(await ask(model, ["1"])) == [""]
            prompts = ["die=1", "die=2", "3", "4"]
            assert codes(await ask(model, prompts)) == ["worker_lost"] * 4
            await recovered(model)
            answers = await ask(model, prompts)
            assert codes(answers) == ["scorer_error", "scorer_error", "", ""]
            assert [answer.score for answer in answers[2:]] == [3.0, 4.0]

    run(test())


@dataclass(frozen=True)
class Watched(Sample):
    """Notes the threads in which it is read."""

    threads: list[int] = field(default_factory=list[int])

    @property
    def digest(self) -> bytes:
        if not self._digest:
            self.threads.append(threading.get_ident())
        return super().digest


def test_large_samples_are_read_beside_the_loop_and_once() -> None:
    async def test() -> None:
        def made(prompt: str) -> Watched:
            return Watched(prompt=prompt, image=np.zeros((2048, 1024, 3), np.uint8))

        first, again, other = ([made(prompt) for prompt in prompts] for prompts in (("die", "1"), ("die", "1"), ("2",)))
        async with serving(batch_pixels=2**22) as model:
            await model.recognize(first)
            assert [sample.threads for sample in first] == [[], []]  # nothing is suspected
            assert codes(await ask(model, first)) == ["worker_lost"] * 2
            await recovered(model)
            await model.recognize([*again, *other])
            assert codes(await ask(model, [*other, *reversed(again)])) == ["", "", "scorer_error"]
            await recovered(model)
        for sample in (*first, *again):
            assert len(sample.threads) == 1 and threading.get_ident() not in sample.threads
        assert other[0].threads == []

    run(test())


def test_the_digest_knows_every_value() -> None:
    image = (np.arange(24) / 24).astype(np.float32).reshape(3, 2, 4)
    whole = Sample(image=image)
    assert whole.digest == Sample(image=image.copy()).digest == Sample(image=np.asfortranarray(image)).digest
    changed = image.copy()
    changed[1, 1, 2] += 1e-6
    others = [
        Sample(image=changed),
        Sample(image=image.reshape(3, 4, 2)),
        Sample(video=image),
        Sample(condition_images=[image]),
        Sample(image=np.zeros((0, 4, 3), np.uint8)),
        Sample(),
    ]
    assert len({whole.digest, *(other.digest for other in others)}) == 1 + len(others)
