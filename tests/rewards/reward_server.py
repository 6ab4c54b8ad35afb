"""A real HTTP server that speaks the wire format, with faults on demand: in a thread, or in a process of its own.

A fault is a word, or a word and a number: what happens to one request (see `Script.score`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, ImageStat

from tests.sockets import read_line
from tiltflow.serving import wire

CONTROL_PATH = "/control"  # not of the protocol: GET tells what has come, POST what to do next and forgets that
ROOT = Path(__file__).resolve().parents[2]
Tensors = Mapping[str, wire.Pixels]
Scoring = Callable[[Sequence[wire.Item], Tensors], list[float]]

# --- models ----------------------------------------------------------------------------------------------------------


def pixels(item: wire.Item, tensors: Tensors) -> wire.Pixels:
    assert isinstance(item.image, wire.Media) and item.image.ref is not None
    return tensors[item.image.ref]


def picture(item: wire.Item, tensors: Tensors) -> Image.Image:
    array = pixels(item, tensors)
    if array.dtype != np.uint8:
        array = np.rint(array.transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)
    return Image.fromarray(array)


def fingerprint(array: wire.Pixels) -> float:
    """Return a number, exact in float32, that any other bit, shape or dtype would change."""
    return float(zlib.crc32(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()) % 2**24)


def score_fingerprint(items: Sequence[wire.Item], tensors: Tensors) -> list[float]:
    return [fingerprint(pixels(item, tensors)) for item in items]


def score_warmth(items: Sequence[wire.Item], tensors: Tensors) -> list[float]:
    means = [ImageStat.Stat(picture(item, tensors)).mean for item in items]
    return [red - blue for red, _, blue in means]


def score_contrast_rank(items: Sequence[wire.Item], tensors: Tensors) -> list[float]:
    assert len({item.group_id for item in items}) == 1 and items[0].group_id is not None
    contrast = [ImageStat.Stat(picture(item, tensors).convert("L")).stddev[0] for item in items]
    return (np.argsort(np.argsort(contrast, kind="stable"), kind="stable") / len(items)).tolist()


def score_length(items: Sequence[wire.Item], tensors: Tensors) -> list[float]:
    return [float(len(item.prompt or "")) for item in items]


MODELS: Mapping[str, tuple[Scoring, wire.ModelInfo]] = {
    "fingerprint8": (score_fingerprint, wire.ModelInfo(name="fingerprint8", required_fields=("image",))),
    "fingerprint32": (
        score_fingerprint,
        wire.ModelInfo(name="fingerprint32", required_fields=("image",), pixels="float32"),
    ),
    "warmth": (score_warmth, wire.ModelInfo(name="warmth", required_fields=("image",), revision="r1")),
    "rank": (score_contrast_rank, wire.ModelInfo(name="rank", required_fields=("image",), groupwise=True)),
    "length": (score_length, wire.ModelInfo(name="length", required_fields=("prompt",))),
}

# --- answers ---------------------------------------------------------------------------------------------------------


def read(content_type: str, body: bytes) -> tuple[wire.ScoreRequest, Tensors]:
    return wire.unpack_safetensors(body) if content_type == wire.SAFETENSORS else (wire.read_request(body), {})


def result(request: wire.ScoreRequest, scores: Sequence[float], info: wire.ModelInfo) -> dict[str, Any]:
    """Return a reply in which every item has its score, and its length as a component."""
    return {
        "object": "score.result",
        "models": [{"name": info.name, "revision": info.revision}],
        "results": [
            {
                "index": index,
                "id": item.id,
                "status": "ok",
                "scores": {info.name: score},
                "components": {info.name: {"letters": len(item.prompt or "")}},
                "error": None,
            }
            for index, (item, score) in enumerate(zip(request.items, scores, strict=True))
        ],
        "batch_size": len(request.items),
        "later": "versions may tell more",
    }


def error(code: str, *, message: str = "told", retry_after_ms: int | None = None) -> tuple[int, dict[str, Any]]:
    told = wire.WireError(code, message, retry_after_ms=retry_after_ms)
    return told.status, {"error": told.body("q1")}


@dataclass
class Seen:
    """One request as it arrived."""

    headers: Mapping[str, str]
    request: wire.ScoreRequest
    tensors: Tensors
    peer: int  # port of the connection
    at: float


@dataclass
class Script:
    """What a server does; tests change it while it runs."""

    model: str
    faults: list[str] = field(default_factory=list[str])  # of the next requests, one each
    always: str = ""  # the fault of those after
    token: str = ""
    state: str = "READY"
    seen: list[Seen] = field(default_factory=list[Seen])
    log: Path | None = None  # a line per request that was answered well, and one per request that came
    info: wire.ModelInfo | None = None

    def described(self) -> wire.ModelInfo:
        return (self.info or MODELS[self.model][1]).model_copy(update={"state": self.state})

    def note(self, **line: Any) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")

    async def respond(self, http: "Http") -> "Reply":
        if http.path == CONTROL_PATH:
            return self.control(http.body)
        if self.token and http.headers.get("authorization") != f"Bearer {self.token}":
            return reply(*error("unauthorized"))
        if http.path == wire.MODELS_PATH:
            return reply(200, {"object": "list", "data": [self.described().model_dump(mode="json")]})
        return await self.score(http)

    def control(self, body: bytes) -> "Reply":
        if body:
            told = json.loads(body)
            self.faults, self.always, self.seen = told["faults"], told["always"], []
        came = [
            {
                "key": seen.headers[wire.KEY_HEADER.lower()],
                "at": seen.at,
                "left_ms": int(seen.headers[wire.DEADLINE_HEADER.lower()]),
            }
            for seen in self.seen
        ]
        return reply(200, came)

    async def score(self, http: "Http") -> "Reply":
        """Do what the next fault says."""
        request, tensors = read(http.headers["content-type"], http.body)
        self.seen.append(Seen(http.headers, request, tensors, http.peer, time.monotonic()))
        key = http.headers[wire.KEY_HEADER.lower()]
        self.note(came=key, items=[item.prompt for item in request.items])
        kind, _, value = (self.faults.pop(0) if self.faults else self.always).partition(":")
        content = result(request, MODELS[self.model][0](request.items, tensors), self.described())
        results = content["results"]
        match kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                await asyncio.sleep(float(value))
            case "cut":
                return Reply(200, b'{"results": [', {"content-length": "1000"})
            case "html":
                return Reply(int(value), b"<h1>Bad Gateway</h1>")
            case "code":
                return reply(*error(value))
            case "patience":
                return reply(*error("overloaded"), headers={"Retry-After": value})
            case "patience_ms":
                return reply(*error("overloaded", retry_after_ms=int(value)))
            case "nan":
                text = json.dumps(content).replace(json.dumps(results[0]["scores"]), f'{{"{self.model}": NaN}}')
                return Reply(200, text.encode())
            case "short":
                results.pop()
            case "twice":
                results[-1]["index"] = 0
            case "swapped":
                results[0]["id"], results[-1]["id"] = results[-1]["id"], results[0]["id"]
            case "foreign":
                results[0]["id"] = "another-request-0"
            case "unscored":
                results[0]["scores"] = {}
            case "revised":
                content["models"][0]["revision"] = "r2"
            case "huge":
                content["padding"] = "x" * (2**20 + 2**16 * len(results))
            case "poison":
                results[int(value)] |= {"status": "error", "scores": {}, "error": error("scorer_error")[1]["error"]}
            case "judge":  # places, such as 0,2: what scores them is out
                for place in map(int, value.split(",")):
                    told = error("upstream_judge")[1]["error"]
                    results[place] |= {"status": "error", "scores": {}, "components": {}, "error": told}
            case "":
                pass
            case _:
                raise ValueError(f"no such fault: {kind}")
        self.note(scored=key, items=[item.prompt for item in request.items])
        if any(each["status"] == "ok" for each in results):
            return reply(200, content)
        return reply(500, content | {"error": results[0]["error"]})


@dataclass
class Http:
    """An HTTP request."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    peer: int


@dataclass
class Reply:
    """An HTTP response."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


def reply(status: int, content: Any, *, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(content).encode(), headers or {})


def app_of(script: Script) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """Return the ASGI application; without a framework, a process of it starts in half the time."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        made = await script.respond(Http(scope["path"], headers, body, scope["client"][1]))
        told = {"content-length": str(len(made.body)), "content-type": wire.JSON, **made.headers}
        pairs = [(name.encode(), value.encode()) for name, value in told.items()]
        await send({"type": "http.response.start", "status": made.status, "headers": pairs})
        await send({"type": "http.response.body", "body": made.body})

    return app


# --- running it ------------------------------------------------------------------------------------------------------


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def server_of(script: Script, *, keep_alive: float = 5) -> uvicorn.Server:
    config = uvicorn.Config(
        app_of(script),
        log_level="critical",
        lifespan="off",
        ws="none",
        timeout_keep_alive=keep_alive,  # pyright: ignore
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def serving(script: Script, *, keep_alive: float = 5, listener: socket.socket | None = None) -> Iterator[str]:
    """Serve from a thread, and yield the URL."""
    own = listener or listen()
    server = server_of(script, keep_alive=keep_alive)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    try:
        yield url_of(own)
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)
        own.close()


@cache
def standing_url(model: str) -> str:
    """Return where a server will answer that `stand` starts, and that lives as long as the process."""
    return url_of(_standing_listener(model))


@cache
def _standing_listener(model: str) -> socket.socket:
    return listen()


@cache
def stand(model: str) -> None:
    """Start the server of `standing_url`."""
    server = server_of(Script(model))
    threading.Thread(target=server.run, kwargs={"sockets": [_standing_listener(model)]}, daemon=True).start()


class Process:
    """The server in a process of its own, which can be killed and stopped."""

    def __init__(self, model: str, folder: Path, *, name: str = "server", port: int = 0, fault: str = ""):
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = url_of(self._listener)
        self.port: int = self._listener.getsockname()[1]
        self.log = folder / f"{name}.jsonl"
        command = [sys.executable, "-m", "tests.rewards.reward_server", model, str(self._listener.fileno())]
        self.process = subprocess.Popen(
            [*command, str(self.log), fault],
            pass_fds=[self._listener.fileno()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._listener.close()  # the process has it now; when it dies, connections are refused
        assert self.process.stdout is not None
        assert read_line(self.process.stdout) == b"ready\n"

    def behave(self, *, faults: Sequence[str] = (), always: str = "") -> None:
        """Say what happens to the next requests, and to those after; forget those that came."""
        self._control(json.dumps({"faults": list(faults), "always": always}).encode())

    def seen(self) -> list[Any]:
        """Return key, moment (of the monotonic clock, which processes share) and time left of every request since."""
        return self._control(None)

    def _control(self, body: bytes | None) -> Any:
        with urllib.request.urlopen(self.url + CONTROL_PATH, body, timeout=30) as response:
            return json.loads(response.read())

    def lines(self, key: str) -> list[Any]:
        """Return what the log has under a key: "came" or "scored"."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [line for line in lines if key in line]

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "descriptor", "log", "fault"):
        parser.add_argument(name)
    asked = parser.parse_args()
    listener = socket.socket(fileno=int(asked.descriptor))
    script = Script(asked.model, faults=[asked.fault] if asked.fault else [], log=Path(asked.log))
    print("ready", flush=True)  # connections wait in the listener until the loop runs
    server_of(script).run(sockets=[listener])


if __name__ == "__main__":
    main()
