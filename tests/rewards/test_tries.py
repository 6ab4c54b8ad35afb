"""A judge's deadline and retries, against real servers that refuse, hang, trickle or do not listen."""

import asyncio
import contextlib
import email.utils
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.judge_server import JudgeServer
from tests.rewards.fake_judge import completion
from tests.rewards.samples import batch, entry
from tests.sockets import dead_port, receive
from tiltflow.errors import JudgeError, JudgeTimeoutError
from tiltflow.rewards import RewardEngine, build_reward
from tiltflow.rewards.judge import ChatEndpoint, EndpointSettings
from tiltflow.rewards.tries import Tries, causes

IMAGE = Image.new("RGB", (4, 4))
SECONDS = 0.6  # of deadlines that are to pass
ENOUGH = 20.0  # of deadlines that are not
LATE = 2.0  # seconds by which a busy machine may be late
Talk = Callable[[socket.socket, "RudeServer"], None]


class RudeServer:
    """Treats every connection as a function says, in a thread each."""

    def __init__(self, talk: Talk):
        self.connections = 0
        self.over = 0  # connections that the client has hung up on, or that were answered
        self.ended = threading.Event()  # the test has
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        self.ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # or else the thread goes on to accept, even what the next one gets
        self._acceptor.join(20)
        assert not self._acceptor.is_alive()
        self._listener.close()

    def trickle(self, connection: socket.socket, text: bytes) -> None:
        """Send one byte after another, for ever, until the client hangs up."""
        while not self.ended.is_set():
            for byte in text:
                connection.sendall(bytes([byte]))
                time.sleep(0.01)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._treat, args=(connection,), daemon=True).start()

    def _treat(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._talk(connection, self)
        self.over += 1


def hear(connection: socket.socket) -> None:
    """Read one request."""
    heard = b""
    while b"\r\n\r\n" not in heard:
        heard += receive(connection)
    head, _, body = heard.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += receive(connection)


def hang(connection: socket.socket, server: RudeServer) -> None:
    hear(connection)
    connection.recv(1)


def trickle_head(connection: socket.socket, server: RudeServer) -> None:
    hear(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    server.trickle(connection, b"X-More: and more\r\n")


def trickle_body(connection: socket.socket, server: RudeServer) -> None:
    hear(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    server.trickle(connection, b"1\r\n \r\n")


def trickle_refusal(connection: socket.socket, server: RudeServer) -> None:
    hear(connection)
    connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
    server.trickle(connection, b" ")


def be_deaf(connection: socket.socket, server: RudeServer) -> None:
    server.ended.wait(20)


@pytest.fixture
def rude() -> Iterator[Callable[[Talk], RudeServer]]:
    servers: list[RudeServer] = []

    def start(talk: Talk) -> RudeServer:
        servers.append(RudeServer(talk))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def endpoint(url: str, **changes: Any) -> ChatEndpoint:
    pytest.importorskip("openai")
    settings = {"base_url": url, "model": "m", "timeout": SECONDS, "max_retries": 50, **changes}
    return ChatEndpoint(EndpointSettings.model_validate(settings))


def ask(judge: ChatEndpoint, image: Image.Image = IMAGE) -> dict[str, float]:
    return dict(judge.first_token([image, "?"], lambda logprobs: logprobs))


# --- the deadline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("talk", [hang, trickle_head, trickle_body, trickle_refusal])
def test_no_peer_outlasts_the_deadline(rude: Callable[[Talk], RudeServer], talk: Talk) -> None:
    server = rude(talk)
    judge = endpoint(server.url)
    asked = 0
    while server.connections < 2:  # a machine that pauses may not even connect in time
        asked += 1
        began = time.monotonic()
        with pytest.raises(JudgeTimeoutError) as caught:
            ask(judge)
        assert SECONDS - 0.05 < time.monotonic() - began < SECONDS + LATE
        assert str(caught.value) == f"the judge 'm' at {server.url} gave no answer within {SECONDS:g} s"
        assert server.connections <= asked < 20
        end = time.monotonic() + 5
        while server.over < server.connections:  # they are not left to the peer
            assert time.monotonic() < end
            time.sleep(0.005)


def test_a_peer_that_does_not_read_does_not_outlast_the_deadline(rude: Callable[[Talk], RudeServer]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)  # more than sockets buffer
    judge = endpoint(rude(be_deaf).url, timeout=1.5)
    began = time.monotonic()
    with pytest.raises(JudgeTimeoutError, match=r"gave no answer within 1\.5 s"):
        ask(judge, Image.fromarray(noise))
    assert time.monotonic() - began < 5.0


def test_a_server_that_refuses_for_ever_is_given_up_at_the_deadline(judge: JudgeServer) -> None:
    judge.behave(status=503)
    began = time.monotonic()
    with pytest.raises(JudgeTimeoutError) as caught:
        ask(endpoint(judge.url, timeout=4.0))
    assert time.monotonic() - began < 4.0 + LATE
    requests = judge.asked()["requests"]
    assert 2 <= requests <= 4  # at 0, 0.5, 1.5 and 3.5 s; or a little earlier
    told = str(caught.value)
    start = re.escape(f"the judge 'm' at {judge.url} gave no answer within 4 s; it failed ")
    failed = re.match(start + r"(once|(\d) times), at last with InternalServerError: Error code: 503", told)
    assert failed is not None and told.endswith("it was told to refuse")
    assert int(failed[2] or 1) in (requests - 1, requests)  # the last one may have had no answer


def test_nobody_there_is_told_as_such() -> None:
    refused = r"failed: APIConnectionError: .*(refused|connect).* \(tried 2 times in "
    with dead_port() as port, pytest.raises(JudgeError, match=refused):
        ask(endpoint(f"http://127.0.0.1:{port}/v1", max_retries=1, timeout=ENOUGH))


def test_a_server_that_is_back_before_the_deadline_is_not_missed(judge: JudgeServer) -> None:
    judge.behave(status=503, times=2, reply="Yes", logprobs=False)
    text = endpoint(judge.url, timeout=10.0).text("", [IMAGE, "?"], str, temperature=0.0, max_tokens=9)
    assert text == "Yes"
    assert judge.asked()["requests"] == 3


@pytest.mark.parametrize(("asked", "requests"), [("0.05", 5), ("3600", 1)])
def test_retry_after(judge: JudgeServer, asked: str, requests: int) -> None:
    """A pause that is asked for is made, and where it would not end in time there is no pause and no further try."""
    judge.behave(status=429, headers={"retry-after": asked})
    began = time.monotonic()
    with pytest.raises(JudgeError, match="RateLimitError"):
        ask(endpoint(judge.url, timeout=ENOUGH, max_retries=4))
    assert time.monotonic() - began < 5.0  # less than the deadline, and than four pauses of its own would take
    assert judge.asked()["requests"] == requests


@pytest.mark.parametrize(("status", "requests"), [(400, 1), (401, 1), (404, 1), (422, 1), (408, 2), (409, 2), (500, 2)])
def test_what_is_tried_again(judge: JudgeServer, status: int, requests: int) -> None:
    judge.behave(status=status, headers={"retry-after": "0.01"})
    with pytest.raises(JudgeError):
        ask(endpoint(judge.url, max_retries=1, timeout=ENOUGH))
    assert judge.asked()["requests"] == requests


def test_waiting_for_a_turn_is_not_counted(judge: JudgeServer) -> None:
    judge.behave(reply="4", delay=0.55)
    options = {"api_base_url": judge.url, "vlm_model": "m", "max_retries": 0, "max_concurrent": 1, "keep_reply": True}
    engine = RewardEngine([entry("r", "rational_rewards_t2i", timeout=2.0, options=options)])
    (failure,) = engine.score(batch([0.2, 0.4, 0.6, 0.8])).failures  # 2.2 seconds in all
    assert (failure.samples, failure.kind) == ((0, 1, 2, 3), "unparsable")


def test_the_timeout_of_an_entry_is_the_deadline_of_its_requests(rude: Callable[[Talk], RudeServer]) -> None:
    server = rude(hang)
    options = {"api_base_url": server.url, "vlm_model": "m"}
    for name in ("vllm_evaluate", "rational_rewards_t2i"):
        began = time.monotonic()
        engine = RewardEngine([entry("r", name, timeout=SECONDS, options=options)])
        table = engine.score(batch([0.2, 0.8]))
        assert time.monotonic() - began < 2 * SECONDS + LATE  # vllm_evaluate also asks for tokens, once
        assert table.column("r").isnan().all()
        assert [(each.samples, each.kind) for each in table.failures] == [((0, 1), "timeout")]


def test_defaults() -> None:
    pytest.importorskip("openai")
    for name, seconds in (("vllm_evaluate", 60), ("rational_rewards_t2i", 180), ("rational_rewards_edit", 180)):
        assert build_reward(name, device="cpu")._endpoint.settings.timeout == seconds  # pyright: ignore


# --- one request, step by step ---------------------------------------------------------------------------------------


class Failure(Exception):
    """What the client raises."""


class Refusal(Failure):
    def __init__(self, status: int, **headers: str):
        super().__init__(f"refused with {status}")
        self.status_code = status
        self.response = SimpleNamespace(headers={name.replace("_", "-"): value for name, value in headers.items()})


class Unreachable(Failure):
    pass


class Late(Unreachable):
    pass


CLIENT = SimpleNamespace(
    OpenAIError=Failure,
    APIStatusError=Refusal,
    APIConnectionError=Unreachable,
    APITimeoutError=Late,
    Timeout=lambda seconds, connect: (seconds, connect),
)


def tries(errors: list[Exception], pauses: list[float], *, seconds: float = 60.0, retries: int = 20) -> Any:
    """Return what becomes of a request that meets these errors and then succeeds; no time passes."""

    async def run() -> Any:
        left = iter(errors)

        async def request(limits: tuple[float, float]) -> str:
            assert limits[0] <= seconds and limits[1] <= 5.0
            for error in left:
                raise error
            return "answer"

        tries = Tries(CLIENT, "the judge", seconds=seconds, retries=retries, at_once=1, sleep=no_sleep)
        return await tries.send(request)

    async def no_sleep(pause: float) -> None:
        pauses.append(pause)

    return asyncio.run(run())


def test_pauses_double_up_to_a_bound_and_differ_by_chance() -> None:
    pauses: list[float] = []
    assert tries([Unreachable()] * 8, pauses) == "answer"
    assert len(pauses) == 8
    for pause, longest in zip(pauses, [0.5, 1, 2, 4, 8, 8, 8, 8], strict=True):
        assert 0.75 * longest <= pause <= longest
    again: list[float] = []
    tries([Unreachable()] * 8, again)
    assert again != pauses


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"retry_after": "3"}, 3.0),
        ({"retry_after": "0"}, None),
        ({"retry_after": "-5"}, None),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "tomorrow"}, None),
        ({"retry_after": "Mon, 01 Jan 2024 00:00:00 +99999999999999"}, None),
        ({"retry_after_ms": "250", "retry_after": "3"}, 0.25),
        ({"retry_after_ms": "x", "retry_after": "3"}, 3.0),
    ],
)
def test_the_pause_that_a_server_asks_for(headers: dict[str, str], pause: float | None) -> None:
    pauses: list[float] = []
    assert tries([Refusal(503, **headers)], pauses) == "answer"
    if pause is None:
        assert 0.375 <= pauses[0] <= 0.5
    else:
        assert pauses == [pause]


def test_a_pause_until_a_date() -> None:
    pauses: list[float] = []
    assert tries([Refusal(503, retry_after=email.utils.formatdate(time.time() + 20, usegmt=True))], pauses) == "answer"
    assert 18 <= pauses[0] <= 20


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Refusal(400), False),
        (Refusal(400, x_should_retry="true"), True),
        (Refusal(503, x_should_retry="false"), False),
        (Unreachable(), True),
        (Late(), True),
        (Failure("of another kind"), False),
    ],
)
def test_what_another_try_may_not_meet(error: Exception, again: bool) -> None:
    pauses: list[float] = []
    if again:
        assert tries([error], pauses) == "answer"
    else:
        with pytest.raises(JudgeError, match="the judge failed: ") as caught:
            tries([error], pauses)
        assert caught.value.__cause__ is error
    assert len(pauses) == again


def test_no_more_tries_than_allowed() -> None:
    pauses: list[float] = []
    with pytest.raises(JudgeError, match=r"the judge failed: Refusal: refused with 500 \(tried 3 times in "):
        tries([Refusal(500)] * 9, pauses, retries=2)
    assert len(pauses) == 2


def test_no_pause_is_begun_that_would_outlast_the_deadline() -> None:
    pauses: list[float] = []
    with pytest.raises(JudgeTimeoutError, match=r"the judge gave no answer within 0\.3 s"):
        tries([Refusal(503)], pauses, seconds=0.3)  # the first pause is 0.375 s at least
    assert pauses == []


def test_other_exceptions_are_not_caught() -> None:
    with pytest.raises(KeyError):
        tries([KeyError("a mistake")], [])


def test_causes_are_short() -> None:
    error = Failure("a page of\n<html>" + "x" * 1000)
    error.__cause__ = OSError("behind")
    told = causes(error)
    assert told.startswith("Failure: a page of <html>xxx") and told.endswith("x...") and len(told) < 420


# --- answers that are cut or no answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b'{"choices": [', "application/json", "answered with no JSON"),
        (b"\xff\xfe{}", "application/json", "answered with no JSON"),
        (b"", "application/json", "answered with no JSON"),
        (b"null", "application/json", "answered with no chat completion"),
        (b"[]", "application/json", "answered with no chat completion"),
        (b"data: {}", "text/event-stream", "answered with no chat completion"),
    ],
)
def test_bodies_that_are_no_answer(
    rude: Callable[[Talk], RudeServer], body: bytes, content_type: str, message: str
) -> None:
    def answer(connection: socket.socket, server: RudeServer) -> None:
        hear(connection)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    with pytest.raises(JudgeError, match=message):
        ask(endpoint(rude(answer).url, max_retries=0, timeout=ENOUGH))


def test_an_answer_that_is_cut_is_tried_again(rude: Callable[[Talk], RudeServer]) -> None:
    def cut(connection: socket.socket, server: RudeServer) -> None:
        hear(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")

    server = rude(cut)
    with pytest.raises(JudgeError, match="APIConnectionError"):
        ask(endpoint(server.url, max_retries=1, timeout=ENOUGH))
    assert server.connections == 2


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(rude: Callable[[Talk], RudeServer]) -> None:
    first, given_up = iter([True]), threading.Event()

    def answer(connection: socket.socket, server: RudeServer) -> None:
        while True:
            hear(connection)
            late = next(first, False)
            if late:
                given_up.wait(20)
            body = json.dumps(completion({"late" if late else "own": -0.1})).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    server = rude(answer)
    judge = endpoint(server.url, timeout=2.0)
    with pytest.raises(JudgeTimeoutError):
        ask(judge)
    given_up.set()
    for level in range(3):
        assert ask(judge, Image.new("RGB", (4, 4), (level, 0, 0))) == {"own": -0.1}
    assert server.connections == 2
