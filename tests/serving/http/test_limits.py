"""What a server must not swallow: bodies that are slow, large or many, and pictures that unfold."""

import io
import json
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.http.servers import Server, at_once, b64, codes, faulty, picture, scores
from tiltflow.serving.guard import Body, ByteBudget
from tiltflow.serving.wire import JSON, NDJSON, SAFETENSORS, Limits, WireError

MIB = 2**20
LIMITS = {
    "body_seconds": 3.0,
    "inflight_bytes": 256 * MIB,
    "image_side": 4096,
    "decoded_bytes": 20 * MIB,
    "items": 100,
    "prompt_bytes": 1000,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with faulty(limits=LIMITS) as running:
        yield running


def head(length: str, *, content_type: str = "application/json", more: str = "") -> bytes:
    return (f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n{length}\r\n{more}\r\n").encode()


def status_of(connection: socket.socket) -> int:
    """Read a reply to its end and return its status."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
        if b"\r\n\r\n" in data and b'"}}' in data:
            break
    return int(data.split(None, 2)[1])


def test_200_slow_bodies_are_cut_and_others_are_served_meanwhile(server: Server) -> None:
    start = time.monotonic()
    slow = [server.connect() for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(head("Content-Length: 1000") + b"{")
        served = 0  # while every slow body was still waited for
        while not select.select(slow, [], [], 0)[0]:
            assert time.monotonic() - start < 30
            answer = server.score(["4"])
            assert (answer.status, scores(answer)) == (200, [4.0])
            served += not select.select(slow, [], [], 0)[0]
        assert served
        assert {status_of(connection) for connection in slow} == {408}
    finally:
        for connection in slow:
            connection.close()
    assert server.score(["4"]).status == 200


@pytest.mark.parametrize(
    "length", ["Content-Length: 100000000000", "Content-Length: 67108865", f"Content-Length: {'9' * 19}"]
)
def test_a_declared_length_beyond_the_limit_is_refused_before_a_byte_of_it(server: Server, length: str) -> None:
    before = server.rss()
    with server.connect() as connection:
        connection.sendall(head(length))
        assert status_of(connection) == 413
    assert server.rss() - before < 10 * MIB


def test_the_refusal_reaches_a_client_that_keeps_sending(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head("Content-Length: 67108865"))
        for _ in range(40):
            connection.sendall(b"x" * 65536)
        assert status_of(connection) == 413


def test_a_chunked_body_is_cut_at_the_limit(server: Server) -> None:
    before = server.rss()
    with server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        sent = 0
        block = b"%x\r\n" % MIB + b"x" * MIB + b"\r\n"
        try:
            while sent < 700:
                connection.sendall(block)
                sent += 1
            status = None
        except OSError:  # the server does not listen to the end
            status = status_of(connection)
        assert (status or status_of(connection)) == 413
    assert sent < 200
    time.sleep(0.2)
    assert server.rss() - before < 10 * MIB


@pytest.fixture
def patient() -> Iterator[Server]:
    with faulty(limits={**LIMITS, "body_seconds": 60.0}) as running:
        yield running


def test_bodies_of_all_requests_together_have_a_budget(patient: Server) -> None:
    server = patient
    connections = [server.connect() for _ in range(12)]
    try:
        for connection in connections:
            connection.sendall(head(f"Content-Length: {60 * MIB}"))
        end = time.monotonic() + 20
        while len(answered := select.select(connections, [], [], 0)[0]) < 8:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert [status_of(connection) for connection in answered] == [429] * 8
        assert server.get("/metrics").body.count(b"tiltflow_inflight_bytes 2.5165824e+08") == 1  # of the other four
    finally:
        for connection in connections:
            connection.close()
    assert server.score(["4"]).status == 200
    end = time.monotonic() + 20
    while b"tiltflow_inflight_bytes 0.0" not in server.get("/metrics").body:
        assert time.monotonic() < end


@pytest.mark.parametrize("name", ["gzip", "br", "deflate"])
def test_compressed_bodies_are_refused(server: Server, name: str) -> None:
    answer = server.score(["4"], headers={"Content-Encoding": name})
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media")


def bomb(side: int = 12000) -> bytes:
    """Return a picture of 144 megapixels in a few hundred KiB."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_of_144_megapixels_is_refused_by_its_header(server: Server) -> None:
    data = bomb()
    assert len(data) < 700 * 1024
    before = server.rss()
    answer = server.post("/v1/score", {"items": [{"prompt": "4", "image": b64(data)} for _ in range(8)]})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (422, "invalid_item", "items[0].image")
    assert "12000x12000" in answer.error["message"]
    assert answer.seconds < 3
    assert server.rss() - before < 40 * MIB  # the bodies themselves, and nothing of the 3.5 GB of pixels


def test_what_all_pictures_unfold_to_has_a_budget(server: Server) -> None:
    items = [{"prompt": "4", "image": b64(picture(side=1800))} for _ in range(3)]
    answer = server.post("/v1/score", {"items": items})
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
    answer = server.post("/v1/score", {"items": items[:2]})
    assert answer.status == 200


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        ({"items": []}, 400, "items"),
        ({"items": [{"prompt": "4"}] * 101}, 413, "items"),
        ({"items": [{"prompt": "x" * 1001}]}, 422, "items[0].prompt"),
        (
            {"items": [{"prompt": "4", "meta": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}}]},
            400,
            "meta",
        ),
        ({"items": [{"prompt": "4", "colour": 1}]}, 400, "items[0].colour"),
        ({"items": [{"prompt": 4}]}, 400, "items[0].prompt"),
        ({"items": [{}]}, 422, "items[0].prompt"),
        ({"items": [{"prompt": "4"}], "params": {"a": 1}}, 400, "params"),
        ({"items": [{"prompt": "4"}], "partial": "maybe"}, 400, "partial"),
        ({"items": [{"prompt": "4"}], "models": ["Other"]}, 404, "models[0]"),
        ({"items": [{"prompt": "4"}], "models": ["Faulty@v9"]}, 404, "models[0]"),
        ({"items": [{"prompt": "4", "image": {"url": "http://x/y.png"}}]}, 400, "items[0].image"),
        ({"items": [{"prompt": "4", "image": {"ref": "a"}}]}, 422, "items[0].image.ref"),
        ([1], 400, None),
    ],
)
def test_wrong_requests_name_the_field(server: Server, content: Any, status: int, param: str | None) -> None:
    answer = server.post("/v1/score", content)
    assert answer.status == status
    assert answer.error["retryable"] is False
    if param is not None:
        assert param in answer.error["param"]


def test_json_numbers_that_json_does_not_have_are_refused(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    for text in ('{"items":[{"prompt":"4","meta":{"a":NaN}}]}', '{"items":[{"prompt":"4"}],"priority":Infinity}', "{"):
        assert server.ask("POST", "/v1/score", text.encode(), headers=headers).status == 400


def test_a_flood_of_tiny_values_is_refused(server: Server) -> None:
    text = b'{"items":[{"prompt":"4","meta":{"a":[' + b"1," * 10**6 + b"1]}}]}"
    answer = server.ask("POST", "/v1/score", text, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error["param"]) == (400, "request")


@pytest.mark.parametrize(("header", "value"), [("X-Request-Timeout-Ms", "soon"), ("Idempotency-Key", "k" * 256)])
def test_wrong_headers_are_named(server: Server, header: str, value: str) -> None:
    answer = server.score(["4"], headers={header: value})
    assert (answer.status, answer.error["param"]) == (400, header)


def test_other_content_types_are_refused_before_the_body(server: Server) -> None:
    answer = server.ask("POST", "/v1/score", b"\x80\x04.", headers={"Content-Type": "application/x-pickle"})
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media")
    assert SAFETENSORS in answer.error["message"]


def test_too_many_connections_are_told_so() -> None:
    with faulty(limits={"connections": 8}) as server:
        held = [server.connect() for _ in range(8)]
        try:
            time.sleep(0.2)
            assert server.get("/livez").status == 503
        finally:
            for connection in held:
                connection.close()
        time.sleep(0.2)
        assert server.get("/livez").status == 200


@pytest.mark.slow
def test_connections_that_never_ask_are_closed(server: Server) -> None:
    quiet, halfway = server.connect(), server.connect()
    with quiet, halfway:
        halfway.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\n")
        start = time.monotonic()
        assert quiet.recv(10) == halfway.recv(10) == b""
        assert 9 < time.monotonic() - start < 14


def test_several_at_once_get_their_own_answers(server: Server) -> None:
    answers = at_once(16, lambda index: server.score([str(index), str(100 + index)]))
    assert [scores(answer) for answer in answers] == [[float(i), 100.0 + i] for i in range(16)]
    assert all(codes(answer) == ["ok", "ok"] for answer in answers)


def test_two_lengths_of_one_body_are_refused() -> None:
    headers = {b"content-length": b"3", b"transfer-encoding": b"chunked"}

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    with pytest.raises(WireError, match="contradict each other"):
        Body(headers, receive, limits=Limits(), budget=ByteBudget(1)).admit()


def test_what_a_request_holds_is_counted_to_its_end_and_never_after() -> None:
    async def receive() -> Any:
        raise AssertionError("nothing is read")

    budget = ByteBudget(100)
    body = Body({b"content-length": b"30"}, receive, limits=Limits(), budget=budget)
    body.admit()
    body.hold(50)
    assert budget.used == 80
    with pytest.raises(WireError) as caught:
        body.hold(21)
    assert (caught.value.code, caught.value.retryable, budget.used) == ("overloaded", True, 80)
    body.release()
    body.hold(50)  # a thread that still decodes for a client that has left
    assert budget.used == 0


def test_the_pixels_of_all_requests_together_have_a_budget() -> None:
    with faulty(limits={"inflight_bytes": 3 * MIB}) as server:
        item = {"prompt": "4", "image": b64(picture(side=800))}  # 1.8 MiB of pixels, a few KiB of file
        assert server.post("/v1/score", {"items": [item]}).status == 200
        answer = server.post("/v1/score", {"items": [item, item]})
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (429, "overloaded", True)
        assert b"tiltflow_inflight_bytes 0.0" in server.get("/metrics").body
        assert server.post("/v1/score", {"items": [item]}).status == 200


def test_an_item_that_is_more_than_one_call_takes_fails_alone() -> None:
    with faulty(batch_pixels=1000) as server:
        assert server.get("/v1/models/Faulty").json["batch_pixels"] == 1000
        items = [{"prompt": "4", "image": b64(picture(side=side))} for side in (8, 40, 8)]
        answer = server.post("/v1/score", {"items": items})
        assert (answer.status, codes(answer)) == (200, ["ok", "invalid_item", "ok"])
        told = answer.json["results"][1]["error"]
        assert told["param"] == "items[1]" and "1600 pixels, more than the 1000" in told["message"]
    with faulty("Ranks", batch_pixels=1000) as server:
        groups = [{"prompt": "4", "image": b64(picture(side=20)), "group_id": name} for name in "aabbba"]
        answer = server.post("/v1/score", {"items": [*groups, {**groups[0], "group_id": "c"}]})
        assert codes(answer) == ["invalid_item"] * 6 + ["ok"]


def ask_for_much(server: Server, accept: str) -> socket.socket:
    """Ask for a reply of 6 MiB, more than the two kernels keep, and read nothing of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    body = json.dumps({"items": [{"prompt": "4", "id": "x" * (MIB // 2)} for _ in range(12)]}).encode()
    connection.sendall(head(f"Content-Length: {len(body)}", more=f"Accept: {accept}\r\nConnection: close\r\n") + body)
    return connection


def rest(connection: socket.socket) -> int:
    """Read to the end and return how many bytes came."""
    size = 0
    while chunk := connection.recv(MIB):
        size += len(chunk)
    return size


def is_established(connection: socket.socket) -> bool:
    """Tell whether the other end, on this machine, is open."""
    port = f":{connection.getsockname()[1]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(peer.endswith(port) and state == "01" for _, _, peer, state, *_ in rows)


@pytest.mark.parametrize("accept", [JSON, NDJSON])
def test_a_client_that_does_not_read_its_reply_is_dropped(server: Server, accept: str) -> None:
    with ask_for_much(server, accept) as connection:
        start = time.monotonic()
        while is_established(connection):
            assert time.monotonic() - start < 40
            time.sleep(0.1)
        assert time.monotonic() - start > 1.0
        assert rest(connection) < 6 * MIB
    assert server.score(["4"]).status == 200
    assert b"tiltflow_inflight_bytes 0.0" in server.get("/metrics").body


@pytest.mark.parametrize("accept", [JSON, NDJSON])
def test_a_client_may_take_its_time_to_read(server: Server, accept: str) -> None:
    with ask_for_much(server, accept) as connection:
        time.sleep(2.5)  # of seven
        assert rest(connection) > 6 * MIB


@pytest.mark.slow
def test_headers_that_do_not_end_are_cut_on_new_and_on_used_connections(server: Server) -> None:
    with server.connect() as new, server.connect() as used, server.connect() as idle:
        for connection in (used, idle):
            assert alive(connection)
        start = time.monotonic()
        open_ones = {new, used}
        for connection in open_ones:
            connection.sendall(b"GET /livez HTTP/1.1\r\nX-Header: ")
        while open_ones:
            assert time.monotonic() - start < 20, open_ones
            for connection in list(open_ones):
                try:
                    connection.sendall(b"x")  # a header without an end
                    gone = bool(select.select([connection], [], [], 0)[0]) and not connection.recv(1)
                except OSError:
                    gone = True
                if gone:
                    open_ones.remove(connection)
            time.sleep(0.25)
        assert time.monotonic() - start > 8
        assert alive(idle)


def alive(connection: socket.socket) -> bool:
    """Ask over a connection whether the server is there, and read the reply to its end."""
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    reply = b""
    while not reply.endswith(b'{"status":"ok"}'):
        part = connection.recv(65536)
        assert part, reply
        reply += part
    return reply.startswith(b"HTTP/1.1 200 OK")


def test_damaged_exif_entries_do_not_fill_the_log() -> None:
    with faulty() as server:
        for tag in range(0x010E, 0x0112):
            entry = struct.pack("<HHII", tag, 2, 100, 5000)  # a text beyond the end: Pillow's warning names the tag
            buffer = io.BytesIO()
            exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
            Image.new("RGB", (8, 8)).save(buffer, "PNG", exif=exif)
            item = {"prompt": "4", "image": b64(buffer.getvalue())}
            assert server.post("/v1/score", {"items": [item]}).status == 200
    assert not any("Tag data" in line for line in server.lines)
