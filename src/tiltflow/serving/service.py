"""What every route stands on: the models, the reader of bodies, the replies that are kept, and the clock."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tiltflow.serving.guard import finish_or_gone, read_body
from tiltflow.serving.idempotency import Replies, Reply
from tiltflow.serving.jobs import Sample
from tiltflow.serving.models import ServedModel
from tiltflow.serving.prometheus import HttpMetrics
from tiltflow.serving.rendering import dump
from tiltflow.serving.requests import Hold, Parsed, RequestReader, media_type
from tiltflow.serving.scoring import Outcome, Scoring, choose
from tiltflow.serving.wire import DEADLINE_HEADER, JSON, KEY_HEADER, NDJSON, Limits, ScoreRequest, WireError

KEY_CHARACTERS: Final = 255
GRACE_SECONDS: Final = 0.5  # after the deadline, for the models' own answer about it

Emit: TypeAlias = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Context:
    """One request apart from its body."""

    id: str
    deadline: float  # on the monotonic clock
    start: float
    key: str | None
    hold: Hold  # counts bytes among those of all requests

    def timing(self, *, received: float, decoded: float, outcome: Outcome) -> dict[str, float]:
        """Return where the time went, in milliseconds."""
        return {
            "receive": round(1000 * (received - self.start), 3),
            "decode": round(1000 * (decoded - received), 3),
            "queue": round(outcome.queue_ms, 3),
            "compute": round(outcome.compute_ms, 3),
            "total": round(1000 * (time.monotonic() - self.start), 3),
        }


class Service:
    """Scores what requests bring."""

    def __init__(self, models: Mapping[str, ServedModel], *, limits: Limits, metrics: HttpMetrics):
        """Take the models of one server, by name."""
        self.models = models
        self.limits = limits
        self.metrics = metrics
        self.reader = RequestReader(limits)
        self._replies = Replies()

    def context(self, request: Request) -> Context:
        """Read the headers that every scoring route knows.

        Raises:
            WireError: `invalid_request`: one of them is wrong.
        """
        start: float = request.state.start
        key = request.headers.get(KEY_HEADER)
        if key is not None and not 0 < len(key) <= KEY_CHARACTERS:
            message = f"a key of {len(key)} characters; use 1 to {KEY_CHARACTERS}"
            raise WireError("invalid_request", message, param=KEY_HEADER)
        seconds = self._seconds(request.headers.get(DEADLINE_HEADER))
        return Context(request.state.request_id, start + seconds, start, key, request.state.hold)

    def admit(self, context: Context, request: ScoreRequest) -> None:
        """Check that the models of a request would take its items, before these are decoded.

        Raises:
            WireError: One of them would not.
        """
        for model in choose(self.models, request.models):
            groups = len({item.group_id for item in request.items})
            model.admit(len(request.items), groups, deadline=context.deadline, priority=request.priority)

    async def score(self, request: Request) -> Response:
        """Answer `POST /v1/score`."""
        context = self.context(request)
        content_type = request.headers.get("content-type", "")
        media_type(content_type)  # refused before the body is read
        stream = NDJSON in request.headers.get("accept", "")
        body = await read_body(request.receive)
        if stream:
            return await self._stream(request, context, body, content_type)
        digest = await self._digest(context, body, content_type)
        with self._replies.join(context.key, digest, partial(self._work, context, body, content_type)) as task:
            reply = await finish_or_gone(task, request.receive, seconds=self._left(context))
        return Response(reply.body, reply.status, media_type=JSON)

    async def scored(self, request: Request, context: Context, parsed: Parsed) -> Outcome:
        """Score the samples of an adapter's request; a client that leaves takes them back."""
        task = asyncio.ensure_future(self._score(parsed, context.deadline, None))
        try:
            return await finish_or_gone(task, request.receive, seconds=self._left(context))
        finally:
            task.cancel()

    def close(self) -> None:
        """End the threads."""
        self.reader.close()

    async def _work(self, context: Context, body: bytes, content_type: str, emit: Emit | None = None) -> Reply:
        received = time.monotonic()
        parsed = await self.reader.read(body, content_type, admit=partial(self.admit, context), hold=context.hold)
        decoded = time.monotonic()
        self.metrics.decode(decoded - received)
        outcome = await self._score(parsed, context.deadline, emit)
        content: dict[str, Any] = {
            "id": context.id,
            "object": "score.result",
            "models": outcome.models,
            "results": outcome.results,
            "counts": outcome.counts,
            "timing_ms": context.timing(received=received, decoded=decoded, outcome=outcome),
            "batch_size": outcome.batch_size,
        }
        status = 200
        forbidden = parsed.request.partial == "forbid" or not outcome.counts["ok"]
        if outcome.error is not None and forbidden:
            status = outcome.error.status
            content = {"error": outcome.error.body(context.id), **content}
        errors = [result["error"] for result in outcome.results if result.get("error")]
        return Reply(status, dump(content), complete=not any(error["retryable"] for error in errors))

    async def _score(self, parsed: Parsed, deadline: float, emit: Emit | None) -> Outcome:
        chosen = choose(self.models, parsed.request.models)
        for model in chosen:
            await model.recognize([sample for sample in parsed.samples if isinstance(sample, Sample)])
        results: dict[int, dict[str, Any]] = {}
        with Scoring(chosen, parsed, deadline=deadline) as scoring:
            async for index in scoring.finished():
                results[index] = scoring.result(index)
                if emit is not None:
                    emit(results[index])
            for (model, outcome), count in scoring.outcomes().items():
                self.metrics.items(model, outcome, count)
            return scoring.outcome([results[index] for index in range(len(results))])

    async def _stream(self, request: Request, context: Context, body: bytes, content_type: str) -> Response:
        """Answer with a line per item as it is done; what joins another request gets its lines at the end."""
        lines: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        digest = await self._digest(context, body, content_type)
        stack = ExitStack()
        work = partial(self._work, context, body, content_type, lines.put_nowait)
        try:
            task = stack.enter_context(self._replies.join(context.key, digest, work))
            task.add_done_callback(lambda _: lines.put_nowait(None))
            waiting = asyncio.ensure_future(lines.get())
            try:
                first = await finish_or_gone(waiting, request.receive, seconds=self._left(context))
            finally:
                waiting.cancel()
            if first is None:
                task.result()  # an error before the first line is an answer of its own
        except BaseException:
            stack.close()
            raise
        return Stream(_lines(first, lines, task, context.id), work=stack)

    async def _digest(self, context: Context, body: bytes, content_type: str) -> bytes:
        if context.key is None:
            return b""
        return await self.reader.parse(len(body), _digest, body, content_type)

    def _left(self, context: Context) -> float:
        return max(0.0, context.deadline - time.monotonic()) + GRACE_SECONDS

    def _seconds(self, told: str | None) -> float:
        if told is None:
            return self.limits.request_seconds
        if not told.isascii() or not told.isdigit() or not int(told[:18]):
            message = f"{DEADLINE_HEADER} is {told!r}; send milliseconds, a whole number from 1"
            raise WireError("invalid_request", message, param=DEADLINE_HEADER)
        return min(int(told[:18]) / 1000, self.limits.longest_request_seconds)


class Stream(StreamingResponse):
    """Lines whose work ends with them, also where the client is gone before the first one is asked for."""

    def __init__(self, lines: AsyncIterator[bytes], *, work: ExitStack):
        """Take over the lines, and what is to be closed behind them."""
        super().__init__(lines, media_type=NDJSON)
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines."""
        with self._work:
            await super().__call__(scope, receive, send)


async def _lines(
    first: Mapping[str, Any] | None,
    lines: "asyncio.Queue[Mapping[str, Any] | None]",
    task: "asyncio.Future[Reply]",
    request_id: str,
) -> AsyncIterator[bytes]:
    """Yield the lines of a stream; only a last one with `done` makes it whole."""
    line, told = first, 0
    while line is not None:
        yield dump(line) + b"\n"
        told += 1
        line = await lines.get()
    try:
        reply = task.result()
    except WireError as error:
        yield dump({"error": error.body(request_id)}) + b"\n"
        return
    content = json.loads(reply.body)
    results = content.pop("results")
    for result in results[told:]:  # all of them, where another request did the work
        yield dump(result) + b"\n"
    yield dump({"done": True, **content} if reply.status == 200 else content) + b"\n"


def _digest(body: bytes, content_type: str) -> bytes:
    return hashlib.sha256(content_type.encode() + b"\n" + body).digest()
