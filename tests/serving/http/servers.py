"""Servers in processes of their own, and plain ways to talk to them."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
START_SECONDS = 120.0  # the package imports much, and machines are busy
LATE = 2.0  # seconds by which a busy machine may be late


@dataclass
class Answer:
    """A reply over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=lambda name: pytest_fail(f"{name} in a reply"))

    @property
    def error(self) -> Any:
        return self.json["error"]


def pytest_fail(message: str) -> None:
    raise AssertionError(message)


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)  # of both its outputs

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send one request on a connection of its own."""
        start = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        told = {key.lower(): value for key, value in reply.getheaders()}
        return Answer(reply.status, told, content, time.monotonic() - start)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, content: Any, **headers: str) -> Answer:
        """Send JSON."""
        told = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        return self.ask("POST", path, json.dumps(content).encode(), headers=told)

    def score(self, prompts: Sequence[str], *, headers: Mapping[str, str] | None = None, **more: Any) -> Answer:
        """Score prompts alone."""
        content = {"items": [{"prompt": prompt} for prompt in prompts], **more}
        told = {"Content-Type": "application/json", **(headers or {})}
        return self.ask("POST", "/v1/score", json.dumps(content).encode(), headers=told)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def rss(self) -> int:
        """Return the resident memory of the HTTP process, in bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def descendants(self) -> list[int]:
        """Return the processes that this one and its children have started."""
        found: list[int] = []
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    children = [int(each) for each in (task / "children").read_text().split()]
                    found += children
                    waiting += children
        return found

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        end = time.monotonic() + seconds
        while self.get("/readyz").status != 200:
            assert time.monotonic() < end, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)

    def wait_queued(self, count: int) -> None:
        """Wait until so many samples wait for the model `Faulty`."""
        end = time.monotonic() + 30
        while self.get("/v1/models/Faulty").json["queue_items"] != count:
            assert time.monotonic() < end, self.lines
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def running(
    *words: str, ready: bool = True, python: str | Path = sys.executable, **environment: str
) -> Iterator[Server]:
    """Run a server until the end of the block; `words` follow `python`."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    process = subprocess.Popen(
        [str(python), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        cwd=HERE,
    )
    lines: list[str] = []
    assert process.stdout is not None
    with process, process.stdout:
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
        reader.start()
        try:
            server = Server(process, _port(process, lines), lines)
            if ready:
                server.wait_ready()
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
            reader.join(5)


@contextlib.contextmanager
def faulty(name: str = "Faulty", *, ready: bool = True, **settings: Any) -> Iterator[Server]:
    """Run `fault_server.py`."""
    with running("fault_server.py", name, json.dumps({"port": 0, **settings}), ready=ready) as server:
        yield server


def calls_of(log: Path, prompt: str) -> int:
    """Return how many calls of a model, one a line in its log, had such a prompt."""
    return sum(prompt in line for line in log.read_text().splitlines())


@contextlib.contextmanager
def busy(server: Server, log: Path, folder: Path) -> Iterator[None]:
    """Keep the model busy until the end of the block."""
    go = folder / "go"
    held = threading.Thread(target=server.score, args=([f"until={go}"],))
    held.start()
    end = time.monotonic() + 30
    while not calls_of(log, str(go)):
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield
    finally:
        go.touch()
        held.join(30)


def _port(process: "subprocess.Popen[str]", lines: Sequence[str]) -> int:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        for line in lines:
            if "listening on http://" in line:
                return int(line.split()[3].rpartition(":")[2])
        if process.poll() is not None:
            break
        time.sleep(0.01)
    raise AssertionError(f"the server did not start: {lines}")


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """Hold a port that was free."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found.getsockname()[1]


def codes(answer: Answer) -> list[str]:
    """Return "ok" or the error code of every item."""
    return ["ok" if each["status"] == "ok" else each["error"]["code"] for each in answer.json["results"]]


def scores(answer: Answer) -> list[float | None]:
    """Return the only model's score of every item."""
    return [next(iter(each["scores"].values()), None) for each in answer.json["results"]]


def at_once(count: int, function: Any) -> list[Any]:
    """Call a function with 0, 1, ... in as many threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


def picture(level: int = 255, *, side: int = 8, form: str = "PNG") -> bytes:
    """Return an encoded picture of one red level."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def levels(count: int, *, side: int = 8) -> Any:
    """Return pictures `[N, H, W, 3]`, each of one level."""
    return np.stack([np.full((side, side, 3), 10 * index, np.uint8) for index in range(count)])
