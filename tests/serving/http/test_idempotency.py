"""Work that is shared by those who ask for the same, kept for a while, and dropped when nobody waits."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tiltflow.serving import idempotency
from tiltflow.serving.idempotency import Replies, Reply
from tiltflow.serving.wire import WireError


class Worker:
    """Makes replies and counts how often."""

    def __init__(self, status: int = 200, *, size: int = 10):
        self.calls = 0
        self.cancelled = 0
        self.status = status
        self.size = size
        self.go = asyncio.Event()

    async def __call__(self) -> Reply:
        self.calls += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Reply(self.status, b"x" * self.size)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 5))  # type: ignore[arg-type]


async def ask(replies: Replies, key: str | None, work: Any, digest: bytes = b"d") -> Reply:
    with replies.join(key, digest, work) as task:
        return await asyncio.shield(task)


def test_the_same_key_joins_and_is_kept() -> None:
    async def test() -> None:
        replies, work = Replies(), Worker()
        first, second = (asyncio.ensure_future(ask(replies, "k", work)) for _ in range(2))
        await asyncio.sleep(0)
        work.go.set()
        assert await first is await second is await ask(replies, "k", work)
        assert work.calls == 1
        with pytest.raises(WireError, match="another body") as caught:
            await ask(replies, "k", work, b"other")
        assert caught.value.status == 409
        await ask(replies, "other", work)
        await ask(replies, None, work)
        await ask(replies, None, work)
        assert work.calls == 4 and len(replies) == 2

    run(test)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_may_go_better_next_time_is_not_kept(status: int) -> None:
    async def test() -> None:
        replies, work = Replies(), Worker(status)
        work.go.set()
        for calls in (1, 2):
            assert (await ask(replies, "k", work)).status == status
            assert work.calls == calls and len(replies) == 0

    run(test)


def test_the_work_ends_with_the_last_who_waits() -> None:
    async def test() -> None:
        replies, work = Replies(), Worker()
        first, second = (asyncio.ensure_future(ask(replies, "k", work)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        assert work.cancelled == 0
        second.cancel()
        await asyncio.sleep(0.01)
        assert (work.calls, work.cancelled, len(replies)) == (1, 1, 0)
        work.go.set()
        assert (await ask(replies, "k", work)).status == 200

    run(test)


def test_an_error_is_told_to_all_and_not_kept() -> None:
    async def test() -> None:
        async def fail() -> Reply:
            raise WireError("loading", "not yet")

        replies = Replies()
        answers = await asyncio.gather(*(ask(replies, "k", fail) for _ in range(2)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [WireError, WireError]
        assert len(replies) == 0

    run(test)


def test_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        now = 0.0
        monkeypatch.setattr(idempotency, "time", SimpleNamespace(monotonic=lambda: now))
        work = Worker()
        work.go.set()
        for replies in (Replies(entries=2), Replies(size=25), Replies(seconds=15)):
            now = 0.0
            for key in ("a", "b", "c"):
                now += 10.0
                await ask(replies, key, work)
            work.calls = 0
            await ask(replies, "c", work)
            assert work.calls == 0
            await ask(replies, "a", work)
            assert work.calls == 1

    run(test)


def test_a_reply_with_an_item_that_may_work_next_time_is_not_kept() -> None:
    assert Reply(200, b"").final
    assert not Reply(200, b"", complete=False).final
