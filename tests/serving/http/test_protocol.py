"""The protocol from the other end of the connection: three kinds of bodies, streams, keys, groups, adapters, tokens."""

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.serving.http.servers import (
    ROOT,
    Answer,
    Server,
    at_once,
    b64,
    busy,
    calls_of,
    codes,
    faulty,
    levels,
    picture,
    running,
    scores,
)
from tests.sockets import receive
from tiltflow.serving.wire import (
    NDJSON,
    REQUEST,
    SAFETENSORS,
    Item,
    Media,
    ScoreRequest,
    in_order,
    pack_safetensors,
    read_reply,
)
from tiltflow.serving.wire import ItemResult as Result


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("protocol") / "calls.jsonl"
    path.touch()
    return path


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Server]:
    with faulty(log=str(log), revision="v3") as running:
        yield running


def tensors(server: Server, request: Any, arrays: dict[str, Any]) -> Answer:
    """Send a safetensors body whose request is JSON of any kind."""
    body = safetensors.numpy.save(arrays, metadata={REQUEST: json.dumps(request)})
    return server.ask("POST", "/v1/score", body, headers={"Content-Type": SAFETENSORS})


def multipart(parts: list[tuple[str, bytes]], *, end: bytes = b"--cut--\r\n") -> tuple[bytes, dict[str, str]]:
    body = b""
    for name, data in parts:
        head = f'--cut\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + end, {"Content-Type": "multipart/form-data; boundary=cut"}


def test_the_three_kinds_of_bodies_score_alike(server: Server) -> None:
    pixels = levels(4)
    expected = [1.0 + 10 * index / 255 for index in range(4)]
    items = [{"prompt": "1", "image": {"ref": "images", "index": index}} for index in range(4)]
    packed = pack_safetensors(
        ScoreRequest(items=[Item(prompt="1", image=Media(ref="images", index=i)) for i in range(4)]), {"images": pixels}
    )
    answer = server.ask("POST", "/v1/score", packed, headers={"Content-Type": SAFETENSORS})
    assert scores(answer) == expected
    reply = read_reply(answer.body, items=4)
    assert (reply.models[0].name, reply.models[0].revision) == ("Faulty", "v3")
    assert scores(tensors(server, {"items": items}, {"images": pixels})) == expected
    floats = np.ascontiguousarray(np.moveaxis(pixels, -1, 1).astype(np.float32) / 255)
    assert scores(tensors(server, {"items": items}, {"images": floats})) == expected

    files = [picture_of(each) for each in pixels]
    request = {"items": [{"prompt": "1", "image": {"ref": f"img.{index}"}} for index in range(4)]}
    body, headers = multipart(
        [("request", json.dumps(request).encode()), *((f"img.{i}", f) for i, f in enumerate(files))]
    )
    assert scores(server.ask("POST", "/v1/score", body, headers=headers)) == expected
    inline = {"items": [{"prompt": "1", "image": b64(file)} for file in files]}
    assert scores(server.post("/v1/score", inline)) == expected


def picture_of(pixels: Any, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("arrays", "item", "param"),
    [
        ({"a": np.zeros((1, 8, 8, 3), np.float64)}, {"ref": "a", "index": 0}, "a"),
        ({"a": np.zeros((1, 8, 8, 3), np.int8)}, {"ref": "a", "index": 0}, "a"),
        ({"a": np.zeros((1, 8, 8, 4), np.uint8)}, {"ref": "a", "index": 0}, "a"),
        ({"a": np.zeros((3, 8, 8), np.uint8)}, {"ref": "a"}, "a"),
        ({"a": np.zeros((8, 8, 3), np.float32)}, {"ref": "a"}, "a"),
        ({"a": np.zeros((8, 8), np.uint8)}, {"ref": "a"}, "a"),
        ({"a": np.zeros((), np.uint8)}, {"ref": "a", "index": 0}, "a"),
        ({"a": np.zeros((0, 8, 8, 3), np.uint8)}, {"ref": "a", "index": 0}, "a"),
        ({"a": np.zeros((2, 8, 8, 3), np.uint8)}, {"ref": "a", "index": 0}, "a"),
        ({"a": np.zeros((2, 8, 8, 3), np.uint8)}, {"ref": "a", "index": 2}, "items[0].image.index"),
        ({"a": np.zeros((8, 8, 3), np.uint8)}, {"ref": "b"}, "items[0].image.ref"),
        ({"a": np.zeros((8, 8, 3), np.uint8), "b": np.zeros((8, 8, 3), np.uint8)}, {"ref": "a"}, "b"),
        ({"a": np.full((3, 8, 8), 1.5, np.float32)}, {"ref": "a"}, "items[0].image"),
        ({"a": np.full((3, 8, 8), np.nan, np.float32)}, {"ref": "a"}, "items[0].image"),
        ({"a": np.zeros((1, 9000, 3), np.uint8)}, {"ref": "a"}, "items[0].image"),
    ],
)
def test_wrong_tensors_name_the_field(server: Server, arrays: Any, item: Any, param: str) -> None:
    answer = tensors(server, {"items": [{"prompt": "1", "image": item}]}, arrays)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (422, "invalid_item", param)


def header(text: str, tail: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + tail


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 100,
        header('{"a":{"dtype":"U8","shape":[8,8,3],"data_offsets":[0,192]}}', b"x" * 100),
        header('{"a":{"dtype":"U8","shape":[0,1000000000,1000000000],"data_offsets":[0,0]}}'),
        header('{"__metadata__":{"request":"{\\"items\\":[{\\"prompt\\":\\"1\\",\\"image\\":{\\"ref\\":\\"a\\"}}]}"},'
               '"a":{"dtype":"U8","shape":[0,1000000000,1000000000],"data_offsets":[0,0]}}'),
        (10**15).to_bytes(8, "little") + b"{}",
        header("[]"),
    ],
)  # fmt: skip
def test_malformed_safetensors_are_refused(server: Server, body: bytes) -> None:
    answer = server.ask("POST", "/v1/score", body, headers={"Content-Type": SAFETENSORS})
    assert answer.status in (400, 422) and answer.error["param"] in ("body", "a", "request")
    assert answer.error["retryable"] is False


def test_malformed_multipart_is_refused(server: Server) -> None:
    request = json.dumps({"items": [{"prompt": "1"}]}).encode()
    for parts, end in (
        ([("other", b"x")], b"--cut--\r\n"),
        ([("request", request)], b""),
        ([("request", request), ("request", request)], b"--cut--\r\n"),
        ([("request", request), ("", b"x")], b"--cut--\r\n"),
    ):
        body, headers = multipart(parts, end=end)
        assert server.ask("POST", "/v1/score", body, headers=headers).status == 400
    body, headers = multipart([("request", request), ("img.0", b"x")])
    answer = server.ask("POST", "/v1/score", body, headers=headers)
    assert (answer.status, answer.error["param"]) == (422, "img.0")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"


@pytest.mark.parametrize(
    "data",
    [
        picture()[:-30],
        picture(side=64, form="JPEG")[:-40],
        picture(form="JPEG")[:-2],
        EPS,
        picture(form="GIF"),
        picture() + b"PK\x03\x04 an archive",
        picture(form="JPEG") + b"<script>" + b"\xff\xd9",
        picture(form="WEBP") + b"more",
        b"GIF89a" + picture(),
        b"",
    ],
)
def test_a_bad_picture_is_an_error_of_its_item_only(server: Server, data: bytes) -> None:
    items = [{"prompt": "1", "image": b64(picture(0))}, {"prompt": "1", "image": b64(data)}, {"prompt": "2"}]
    answer = server.post("/v1/score", {"items": items})
    assert answer.status == 200
    assert codes(answer) == ["ok", "image_decode_failed", "ok"]
    assert answer.json["results"][1]["error"]["param"] == "items[1].image"
    alone = server.post("/v1/score", {"items": items[1:2]})
    assert (alone.status, alone.error["code"]) == (422, "image_decode_failed")


def test_no_base64_is_an_error_of_its_item(server: Server) -> None:
    answer = server.post("/v1/score", {"items": [{"prompt": "1", "image": {"b64": "???"}}, {"prompt": "1"}]})
    assert codes(answer) == ["image_decode_failed", "ok"]


def test_a_stream_has_a_line_per_item_and_done(server: Server) -> None:
    answer = server.score(["1", "poison", "3"], headers={"Accept": NDJSON})
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert answer.headers["content-type"].startswith(NDJSON)
    assert lines[-1]["done"] is True and lines[-1]["counts"] == {"ok": 2, "error": 1}
    ordered = in_order([Result.model_validate(line) for line in lines[:-1]], items=3)
    assert [each.scores.get("Faulty") for each in ordered] == [1.0, None, 3.0]


def test_a_stream_tells_items_as_they_are_done(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with faulty(batch_size=1) as server, server.connect() as connection:
        body = json.dumps({"items": [{"prompt": "1"}, {"prompt": f"until={go}"}]}).encode()
        connection.sendall(
            f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAccept: {NDJSON}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        seen = b""
        while b'"index":0' not in seen:
            seen += receive(connection)
        assert b'"index":1' not in seen and b"done" not in seen
        go.touch()


def test_a_stream_that_breaks_has_no_done() -> None:
    with faulty(batch_size=1) as server:
        answer = server.score(["1", "kill"], headers={"Accept": NDJSON})
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert answer.status == 200 and lines[0]["status"] == "ok"
        assert "done" not in lines[-1] and lines[-1]["error"]["code"] == "worker_lost"
        server.wait_ready()
        assert server.score(["kill=2"], headers={"Accept": NDJSON}).status == 503  # nothing was sent before it


def test_the_same_key_is_computed_once(server: Server, log: Path) -> None:
    key = {"Idempotency-Key": "one"}
    answers = at_once(4, lambda _: server.score(["sleep=0.501"], headers=key))
    answers.append(server.score(["sleep=0.501"], headers=key))
    assert [scores(answer) for answer in answers] == [[0.501]] * 5
    assert len({answer.json["id"] for answer in answers}) == 1
    assert calls_of(log, "sleep=0.501") == 1
    stream = server.score(["sleep=0.501"], headers={**key, "Accept": NDJSON})
    lines = [json.loads(line) for line in stream.body.splitlines()]
    assert [line.get("done", line.get("index")) for line in lines] == [0, True]
    assert calls_of(log, "sleep=0.501") == 1


def test_the_same_key_for_another_body_is_a_conflict(server: Server) -> None:
    assert server.score(["1"], headers={"Idempotency-Key": "two"}).status == 200
    answer = server.score(["2"], headers={"Idempotency-Key": "two"})
    assert (answer.status, answer.error["code"]) == (409, "idempotency_conflict")


def test_a_failure_is_not_kept_for_its_key(server: Server, log: Path) -> None:
    for _ in range(2):
        assert server.score(["poison", "nan"], headers={"Idempotency-Key": "three"}).status == 500
    assert sum('["poison", "nan"]' in line for line in log.read_text().splitlines()) == 2


def leave(server: Server, prompt: str, *, key: str = "") -> None:
    """Send a request and close the connection before its answer."""
    body = json.dumps({"items": [{"prompt": prompt}]}).encode()
    more = f"Idempotency-Key: {key}\r\n" if key else ""
    with server.connect() as connection:
        connection.sendall(
            f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        server.wait_queued(1)
        time.sleep(0.1)


def test_what_a_client_that_left_had_asked_is_not_computed(server: Server, log: Path, tmp_path: Path) -> None:
    with busy(server, log, tmp_path):
        leave(server, "sleep=0.0111")
        for _ in range(10):  # what it answers now it has heard after that
            assert server.get("/livez").status == 200
    assert scores(server.score(["6"])) == [6.0]
    assert calls_of(log, "sleep=0.0111") == 0


def test_it_is_computed_if_somebody_else_joined(server: Server, log: Path, tmp_path: Path) -> None:
    answers: list[Answer] = []

    def join() -> None:
        answers.append(server.score(["sleep=0.0222"], headers={"Idempotency-Key": "four"}))

    with busy(server, log, tmp_path):
        second = threading.Thread(target=join)
        first = threading.Thread(target=leave, args=(server, "sleep=0.0222"), kwargs={"key": "four"})
        first.start()
        server.wait_queued(1)
        second.start()
        first.join(30)
        time.sleep(0.2)
    second.join(30)
    assert scores(answers[0]) == [0.0222]
    assert calls_of(log, "sleep=0.0222") == 1


def test_groups_are_compared_whole() -> None:
    with faulty("Ranks") as server:
        items = [
            {"prompt": prompt, "group_id": group}
            for prompt, group in [("aaa", "g"), ("b", "h"), ("a", "g"), ("bb", "h"), ("aa", "g")]
        ]
        answer = server.post("/v1/score", {"items": items})
        assert scores(answer) == [2 / 3, 0.0, 0.0, 0.5, 1 / 3]
        assert server.get("/v1/models").json["data"][0]["groupwise"] is True
        answer = server.post("/v1/score", {"items": [{"prompt": "a"}]})
        assert (answer.status, answer.error["param"]) == (422, "items[0].group_id")
        items[2] = {"prompt": "a", "group_id": "g", "image": b64(b"broken")}
        answer = server.post("/v1/score", {"items": items})
        assert codes(answer) == ["invalid_item", "ok", "image_decode_failed", "ok", "invalid_item"]
        assert server.post("/compute", {"prompt": ["aaa", "a"]}).json == {"rewards": [0.5, 0.0]}


def test_compute(server: Server) -> None:
    encoded = [base64.b64encode(picture(level)).decode() for level in (0, 51)]
    body = {"prompt": ["1", "2"], "image": encoded, "unknown": 1}
    assert server.post("/compute", body).json == {"rewards": [1.0, 2.2]}
    body["image"] = ["data:image/png;base64," + each for each in encoded]
    assert server.post("/compute", body).json == {"rewards": [1.0, 2.2]}
    everything = {
        **body,
        "video": [[encoded[0]] * 2] * 2,
        "condition_images": [[encoded[1]]] * 2,
        "metadata": [{"a": 1}] * 2,
    }
    assert server.post("/compute", everything).json == {"rewards": [1.0, 2.2]}
    assert server.post("/compute?model=Faulty", body).status == 200
    assert server.get("/health").json["status"] == "ok"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": ["1", "2"], "image": [base64.b64encode(b"broken").decode()]}, 422),
        ({"prompt": ["1"], "image": [base64.b64encode(b"broken").decode()]}, 422),
        ({"prompt": ["1", "nan"]}, 500),
        ({"prompt": ["1", "short"]}, 500),
        ({"prompt": "1"}, 400),
        ({"image": []}, 400),
        ({"prompt": []}, 400),
    ],
)
def test_compute_fails_as_a_whole(server: Server, body: Any, status: int) -> None:
    answer = server.post("/compute", body)
    assert answer.status == status
    assert "rewards" not in answer.json
    assert isinstance(answer.json["detail"], str) and answer.error["message"] == answer.json["detail"]


def test_get_reward(server: Server) -> None:
    body = {"query": ["7", "8"], "prompts": ["p", "q"], "labels": ["a", None]}
    assert server.post("/get_reward", body).json == {"rewards": [7.0, 8.0], "scores": [7.0, 8.0], "extra_logs": {}}
    answer = server.post("/get_reward", {"query": ["7"], "labels": []})
    assert (answer.status, answer.error["param"]) == (422, "labels")


def test_what_is_told_of_the_model(server: Server) -> None:
    told = server.get("/v1/models/Faulty").json
    assert (told["name"], told["state"], told["revision"], told["batch_size"]) == ("Faulty", "READY", "v3", 16)
    assert told["required_fields"] == ["prompt"] and told["limits"]["items"] == 256
    assert server.get("/v1/models/Other").status == server.get("/nothing").status == 404
    assert server.get("/v1/score").error["code"] == "method_not_allowed"
    assert scores(server.score(["1"], models=["Faulty@v3"])) == [1.0]
    assert "/v1/score" in server.get("/openapi.json").json["paths"]


def test_the_request_id_is_told_back(server: Server) -> None:
    assert server.get("/livez", **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    answer = server.score([], headers={"X-Request-Id": "mine 2"})
    assert answer.headers["x-request-id"] == answer.error["request_id"] != "mine 2"


def test_metrics(server: Server) -> None:
    server.score(["1", "nan"])
    text = server.get("/metrics").body.decode()
    for name in (
        'requests_total{code="200",route="/v1/score"}',
        'items_total{model="Faulty",outcome="ok"}',
        'nonfinite_total{model="Faulty"}',
        'model_state{model="Faulty",state="READY"} 1.0',
        'queue_items{model="Faulty"} 0.0',
        "inflight_bytes 0.0",
        "decode_seconds_count",
        'queue_wait_seconds_count{model="Faulty"}',
        'batch_size_count{model="Faulty"}',
    ):
        assert f"tiltflow_{name}" in text
    assert "process_resident_memory_bytes" in text


def test_a_token_is_asked_of_everything_but_probes() -> None:
    with faulty(token="s3cret") as server:
        assert server.get("/livez").status == server.get("/readyz").status == server.get("/health").status == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            answer = server.get(path)
            assert (answer.status, answer.error["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.score(["1"]).status == 401
        assert server.score(["1"], headers={"Authorization": "Bearer wrong"}).status == 401
        assert server.score(["1"], headers={"Authorization": "Bearer s3cret"}).status == 200
        assert server.get("/v1/models", Authorization="bearer s3cret").status == 200


def test_a_model_that_loads_is_told(tmp_path: Path) -> None:
    script = tmp_path / "slow_server.py"
    script.write_text(
        "import time\n"
        "from tiltflow.serving import RewardServer\n"
        "class Slow(RewardServer):\n"
        "    required_fields = ('prompt',)\n"
        "    def setup(self):\n"
        "        time.sleep(2)\n"
        "    def compute_reward(self, prompts):\n"
        "        return [1.0] * len(prompts)\n"
        "if __name__ == '__main__':\n"
        "    Slow(port=0).run()\n"
    )
    with running(str(script), ready=False) as server:
        assert server.get("/livez").status == 200
        ready = server.get("/readyz")
        assert (ready.status, ready.error["code"], ready.headers["retry-after"]) == (503, "loading", "1")
        answer = server.score(["1"])
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "loading", True)
        server.wait_ready()
        assert scores(server.score(["1"])) == [1.0]


def test_the_example_of_flow_factory_runs_with_only_its_import_changed() -> None:
    with running("example_server.py", "--port", "0", TILTFLOW_SERVER_TOKEN="t") as server:
        assert "0.0.0.0" in server.lines[0]
        headers = {"Authorization": "Bearer t"}
        answer = server.post("/compute", {"prompt": ["ab"], "image": [b64(picture())["b64"]]}, **headers)
        assert answer.json == {"rewards": [3.0]}
        items = [{"prompt": "ab", "image": b64(picture())}]
        assert scores(server.post("/v1/score", {"items": items}, **headers)) == [3.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["example_server.py"], "TILTFLOW_SERVER_TOKEN"),
        (["fault_server.py", "Faulty", '{"port": 0, "host": "10.255.255.1", "insecure": true}'], "cannot listen there"),
        (["fault_server.py", "Faulty", '{"port": 99999}'], "port=99999"),
        (["fault_server.py", "Faulty", '{"port": 0, "name": "a@b"}'], "leave out @"),
    ],
)
def test_settings_that_cannot_work_are_told(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": ""},
    )
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_port_that_is_taken_is_told(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "fault_server.py", "Faulty", json.dumps({"port": port})],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=Path(__file__).parent,
            env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": ""},
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()  # no traceback
    assert line.startswith("tiltflow: ") and f"port={port}" in line
