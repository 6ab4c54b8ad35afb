"""A stream whose client leaves, without a server."""

import asyncio
import time
from typing import Any

from starlette.requests import Request

from tiltflow.serving.idempotency import Reply
from tiltflow.serving.prometheus import make_metrics
from tiltflow.serving.service import Service
from tiltflow.serving.wire import JSON, NDJSON, Limits


class Endless(Service):
    """Has the first line at once, and never the next."""

    cancelled = False

    async def _work(self, context: Any, body: bytes, content_type: str, emit: Any = None) -> Reply:
        emit({"index": 0})
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return Reply(200, b"{}")


def test_a_client_that_leaves_before_the_first_line_is_sent_ends_the_work() -> None:
    async def test() -> None:
        service = Endless({}, limits=Limits(), metrics=make_metrics())
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"spec_version": "2.3"},
            "headers": [(b"accept", NDJSON.encode()), (b"content-type", JSON.encode())],
            "state": {"request_id": "a", "start": time.monotonic(), "hold": lambda count: None},
        }
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]
        left = asyncio.Event()
        sent: list[str] = []

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])
            await asyncio.sleep(0)

        try:
            response = await service.score(Request(scope, receive))
            left.set()
            await response(scope, receive, send)
            await asyncio.sleep(0.01)
            assert service.cancelled
            assert "http.response.body" not in sent
        finally:
            service.close()

    asyncio.run(asyncio.wait_for(test(), 30))
