"""A real server under random faults and rude clients, for SOAK_SECONDS (600 unless told otherwise): `make soak`."""

import http.client
import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.helpers import is_running
from tests.serving.http.servers import Server, at_once, running
from tests.serving.http.soak_clients import Tally, body_of, keyed, make, own_client, rude_client
from tiltflow.serving import wire
from tiltflow.serving.idempotency import KEPT_ENTRIES

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
REPLICAS = 2
WINDOW = 10.0  # seconds over which memory is averaged
WARM_UP = min(60.0, max(20.0, SECONDS / 4))
LOST_EVERY = 35.0  # seconds from one lost worker to the next: three within a minute would be the end of the model
RAISE_EVERY = 1.5
GROWTH = 0.05
MEMORY = "memfd:tiltflow"


def fill_replies(server: Server) -> None:
    """Let the replies that the server keeps turn over three times: until then its heap grows around them."""
    bodies = [
        body_of([make(random.Random(f"{number} {place}"), kinds=("good",)) for place in range(number % 8 + 1)])
        for number in range(200)
    ]

    def ask(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for _ in range(3 * KEPT_ENTRIES // 4):
            body = random.choice(bodies)
            connection.request("POST", wire.SCORE_PATH, body, keyed())
            assert not json.loads(connection.getresponse().read())["counts"]["error"]
        connection.close()

    at_once(4, ask)


class Watch:
    """Looks at the server while it is under fire."""

    def __init__(self, server: Server):
        self.server = server
        self.memory: list[tuple[float, int]] = []
        self.family: set[int] = set(server.descendants())

    def look(self) -> None:
        self.memory.append((time.monotonic(), self.server.rss()))
        self.family.update(self.server.descendants())

    def resident(self, begin: float) -> float:
        """Return the median of the memory, in bytes, within a window."""
        return statistics.median(size for at, size in self.memory if begin <= at < begin + WINDOW)


def shared_memory(server: Server) -> tuple[int, int]:
    """Return how many pieces of memory shared with workers the HTTP process has mapped, and has open."""
    place = Path(f"/proc/{server.process.pid}")
    names = [os.readlink(each) for each in (place / "fd").iterdir()]
    return (place / "maps").read_text().count(MEMORY), sum(MEMORY in name for name in names)


def misfortune(folder: Path, watch: Watch, chance: random.Random, end: float) -> dict[str, int]:
    """Break the model again and again until the end; return how often."""
    dealt = {"raise": 0, "hang": 0, "kill": 0}
    lost_at = raised_at = time.monotonic()
    watched_at = 0.0
    while (now := time.monotonic()) < end:
        if now - raised_at > RAISE_EVERY * chance.uniform(0.5, 1.5):
            raised_at = now
            (folder / "raise").touch()
            dealt["raise"] += 1
        if now - lost_at > LOST_EVERY or (dealt["kill"] == 0 and now - lost_at > 5):
            lost_at = now
            fault = "kill" if dealt["kill"] <= dealt["hang"] else "hang"
            (folder / fault).touch()
            dealt[fault] += 1
        if now - watched_at > 0.5:
            watched_at = now
            watch.look()
        time.sleep(0.05)
    return dealt


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.soak
def test_soak(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}, {SECONDS:g} s")
    settings = {"port": 0, "replicas": REPLICAS, "batch_seconds": 2.0, "faults": str(tmp_path)}
    script = str(Path(__file__).with_name("http") / "soak_server.py")
    tally, ended = Tally(), threading.Event()
    with running(script, json.dumps(settings)) as server:
        fill_replies(server)
        watch = Watch(server)
        with ThreadPoolExecutor(6) as pool:
            begun = time.monotonic()
            clients = [
                pool.submit(own_client, server, tally, random.Random(f"{seed} own {n}"), ended.is_set) for n in range(2)
            ]
            clients += [
                pool.submit(rude_client, server, tally, random.Random(f"{seed} rude {n}"), ended) for n in range(4)
            ]
            try:
                dealt = misfortune(tmp_path, watch, random.Random(f"{seed} faults"), begun + WARM_UP + SECONDS)
            finally:
                ended.set()
            for client in clients:
                client.result()
        before, after = watch.resident(begun + WARM_UP), watch.resident(begun + WARM_UP + SECONDS - WINDOW)
        server.wait_ready(30)
        mapped, held = shared_memory(server)
        print(f"shared memory: {mapped} mapped, {held} descriptors")
        assert mapped <= REPLICAS and held <= 2 * REPLICAS  # a mapping has a descriptor of its own
        curve = [size for _, size in watch.memory][:: max(1, len(watch.memory) // 20)]
        print(json.dumps({"rss_mib": [round(x / 2**20, 1) for x in (before, after)], "faults": dealt}))
        print(json.dumps({"rss_mib_over_time": [round(size / 2**20, 1) for size in curve]}))
        print(json.dumps(dict(sorted(tally.counts.items())), indent=1))
        assert not list(tmp_path.iterdir()), "a fault that no call met"
        server.signal(signal.SIGTERM)
        assert server.process.wait(30) in (0, -signal.SIGTERM)
    wait_for(lambda: not any(is_running(pid) for pid in watch.family))
    assert tally.wrong == [], f"{len(tally.wrong)} complaints"
    assert after < (1 + GROWTH) * before
    assert dealt["raise"] and dealt["kill"]
    assert tally.counts["unlucky"] <= 2 * dealt["raise"]  # one sample each; two may be told of it
    check_luck(tally)


def check_luck(tally: Tally) -> None:
    """Check that nearly all good samples were scored, and that every kind of mischief was done."""
    own = tally.counts["own: ok"]
    passed = sum(count for name, count in tally.counts.items() if name.startswith("own: "))
    assert own > 0.85 * passed  # seven in a hundred are not meant to have a score
    for name in ("raw: image_decode_failed", "raw: nonfinite_score", "raw: scorer_error", "slow: half", "slow: gone"):
        assert tally.counts[name]
