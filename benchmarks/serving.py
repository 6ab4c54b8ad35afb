"""What a reward server costs beside its model: one JSON line.

    python -m benchmarks.serving [--images 8] [--seconds 4]

A server with a scorer that returns a constant is started as its own process (which starts its worker); requests are
made once and sent again and again over plain sockets, so that the client, which shares the processor, costs little.

`*_cpu_ms_per_image`: processor time of the HTTP process and the worker together, per 512x512 image, for each form of
the body: safetensors, multipart with JPEG (quality 95) or PNG, JSON with PNG in base64. `empty_requests_per_second`:
requests of one item with a prompt and no picture, 32 connections. `p50_ms` and `p99_ms`: the same over one connection.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiltflow.serving import RewardServer
from tiltflow.serving.wire import JSON, MULTIPART, SAFETENSORS, SCORE_PATH, Item, Media, ScoreRequest, pack_safetensors

SIDE = 512  # pixels
BOUNDARY = "a-boundary-that-is-in-no-picture"
TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the times in /proc


class Constant(RewardServer):
    """Scores everything alike, at once."""

    required_fields = ("prompt",)  # pictures are decoded and passed all the same, where there are any

    def compute_reward(self, prompts: list[str], images: Any = None) -> list[float]:
        return [0.5] * len(prompts)


# --- requests ---------------------------------------------------------------------------------------------------------


def photo(seed: int) -> np.ndarray:
    """Return a picture with the smoothness and the noise of a photograph, uint8 `[512, 512, 3]`."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(picture: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {"compress_level": 1}
    Image.fromarray(picture).save(buffer, format=kind, **options)
    return buffer.getvalue()


def request_of(media: list[Media]) -> ScoreRequest:
    return ScoreRequest(items=[Item(id=str(n), prompt="a photo", image=each) for n, each in enumerate(media)])


def safetensors_body(pictures: list[np.ndarray]) -> tuple[str, bytes]:
    names = [f"img.{index}" for index in range(len(pictures))]
    request = request_of([Media(ref=name) for name in names])
    return SAFETENSORS, pack_safetensors(request, dict(zip(names, pictures, strict=True)))


def multipart_body(pictures: list[np.ndarray], kind: str) -> tuple[str, bytes]:
    names = [f"img.{index}" for index in range(len(pictures))]
    text = request_of([Media(ref=name) for name in names]).model_dump_json(by_alias=True, exclude_defaults=True)
    parts = [("request", JSON, text.encode())]
    parts += [(name, f"image/{kind}", encoded(each, kind)) for name, each in zip(names, pictures, strict=True)]
    body = b""
    for name, content_type, data in parts:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
        head = head if name != "request" else head.replace(f'; filename="{name}"', "")
        body += f"{head}Content-Type: {content_type}\r\n\r\n".encode() + data + b"\r\n"
    return f"{MULTIPART}; boundary={BOUNDARY}", body + f"--{BOUNDARY}--\r\n".encode()


def json_body(pictures: list[np.ndarray]) -> tuple[str, bytes]:
    media = [Media(b64=base64.b64encode(encoded(each, "png")).decode()) for each in pictures]
    return JSON, request_of(media).model_dump_json(by_alias=True, exclude_defaults=True).encode()


def empty_body() -> tuple[str, bytes]:
    return JSON, b'{"items":[{"id":"0","prompt":"a photo"}]}'


def message(port: int, content_type: str, body: bytes) -> bytes:
    head = (
        f"POST {SCORE_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# --- client -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[Callable[[bytes], Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)

    async def send(data: bytes) -> bytes:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert found is not None and head.startswith(b"HTTP/1.1 200"), head
        return await reader.readexactly(int(found.group(1)))

    try:
        yield send
    finally:
        writer.close()
        await writer.wait_closed()


async def load(port: int, data: bytes, *, connections: int, seconds: float) -> list[float]:
    """Send one request again and again over so many connections, and return how long each took, in seconds."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        async with connection(port) as send:
            while time.perf_counter() < end:
                began = time.perf_counter()
                await send(data)
                took.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(connections)))
    return took


async def check(port: int, data: bytes, count: int) -> None:
    async with connection(port) as send:
        reply = json.loads(await send(data))
    assert [result["scores"] for result in reply["results"]] == [{"Constant": 0.5}] * count, reply


# --- server -----------------------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    children = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return [pid, *(member for child in children for member in family(child))]


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and all that it has started."""
    fields = [Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split() for member in family(pid)]
    return sum(int(field[11]) + int(field[12]) for field in fields) / TICKS


def port_of(process: subprocess.Popen[str]) -> int:
    """Wait until the server's model is ready, and return where it listens."""
    assert process.stdout is not None
    found = re.search(r"listening on \S+:(\d+)", process.stdout.readline())
    assert found is not None and "is ready" in process.stdout.readline()
    return int(found.group(1))


def cost(pid: int, port: int, body: tuple[str, bytes], *, images: int, seconds: float) -> tuple[float, float]:
    """Return the server's processor milliseconds per image, and images per second, over two connections."""
    data = message(port, *body)
    asyncio.run(check(port, data, images))
    asyncio.run(load(port, data, connections=2, seconds=seconds / 4))
    before, began = cpu_seconds(pid), time.perf_counter()
    count = images * len(asyncio.run(load(port, data, connections=2, seconds=seconds)))
    return 1000 * (cpu_seconds(pid) - before) / count, count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="per request")
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.serve:
        Constant(port=0, batch_size=64).run()
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        port = port_of(process)
        pictures = [photo(seed) for seed in range(known.images)]
        line: dict[str, Any] = {"benchmark": "serving", "image_side": SIDE, "images_per_request": known.images}
        bodies = {
            "safetensors": safetensors_body(pictures),
            "jpeg": multipart_body(pictures, "jpeg"),
            "png": multipart_body(pictures, "png"),
            "json_png": json_body(pictures),
        }
        for name, body in bodies.items():
            milliseconds, rate = cost(process.pid, port, body, images=known.images, seconds=known.seconds)
            line[f"{name}_cpu_ms_per_image"] = round(milliseconds, 2)
            line[f"{name}_images_per_second"] = round(rate, 1)
        empty = message(port, *empty_body())
        asyncio.run(load(port, empty, connections=32, seconds=1))
        took = asyncio.run(load(port, empty, connections=32, seconds=known.seconds))
        line["empty_requests_per_second"] = round(len(took) / known.seconds)
        alone = sorted(asyncio.run(load(port, empty, connections=1, seconds=known.seconds)))
        line["p50_ms"] = round(1000 * statistics.median(alone), 2)
        line["p99_ms"] = round(1000 * alone[int(0.99 * len(alone))], 2)
        print(json.dumps(line))
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
