"""Remote rewards over real server processes that are killed, stopped, overloaded and started again."""

import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rewards.reward_server import Process, Script, serving
from tests.rewards.samples import batch, entry
from tests.sockets import dead_port, wait_until
from tiltflow.rewards import RewardEngine, build_reward_model
from tiltflow.rewards import transport as transport_module
from tiltflow.types import RewardTable

LEVELS = [index / 40 for index in range(40)]


def far(*urls: str, **fields: Any) -> Any:
    """Return an engine with one remote reward in four lanes, and the reward."""
    known = {name: fields.pop(name) for name in ("timeout", "batch_size", "num_workers") if name in fields}
    given = {"batch_size": 2, "num_workers": 4, "async_reward": True, "timeout": 60, **known}
    arguments = entry("far", "RemotePointwiseRewardModel", options={"server_url": list(urls), **fields}, **given)
    reward = build_reward_model(arguments)
    return RewardEngine([arguments], factory=lambda _: reward), reward


def expect(table: RewardTable) -> None:
    """Check that every sample has its own score."""
    assert table.failures == ()
    assert table.column("far").tolist() == [float(len(f"prompt {index}")) for index in range(len(LEVELS))]


def scored(*servers: Process) -> Counter[str]:
    """Return how often each sample was scored."""
    return Counter(item for server in servers for line in server.lines("scored") for item in line["items"])


@pytest.mark.parametrize("workers", [1, 4])
def test_lanes_of_the_engine_share_one_client(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "KEEPALIVE_SECONDS", 60)  # however slow the machine
    script = Script("length", always="hang:0.03")
    with serving(script, keep_alive=60) as url:
        engine, _ = far(url, num_workers=workers)
        expect(engine.score(batch(LEVELS)))
    assert len(script.seen) == 20
    # One connection, made when the reward was built, and at most one more for each further lane.
    assert 1 <= len({seen.peer for seen in script.seen}) <= workers


def test_a_server_killed_in_the_middle_of_a_batch_is_replaced_by_another(tmp_path: Path) -> None:
    with (
        Process("length", tmp_path, name="first", fault="kill") as first,
        Process("length", tmp_path, name="second") as second,
    ):
        engine, _ = far(first.url, second.url)
        expect(engine.score(batch(LEVELS)))
        assert first.process.wait(5) == -signal.SIGKILL
        assert set(scored(first, second).values()) == {1}
        (lost,) = first.lines("came")
        assert lost["came"] in {line["scored"] for line in second.lines("scored")}


def test_a_server_that_is_killed_and_started_again_costs_nothing_but_time(tmp_path: Path) -> None:
    with dead_port() as port:
        first = Process("length", tmp_path, name="first", port=port)
        engine, _ = far(first.url, batch_size=1)
        with engine.begin() as scoring:
            scoring.add_batch(batch(LEVELS[:20]))
            wait_until(lambda: len(first.lines("scored")) >= 5)
            first.__exit__()
            again: list[Process] = []
            timer = threading.Timer(1.0, lambda: again.append(Process("length", tmp_path, name="again", port=port)))
            timer.start()
            samples = batch(LEVELS)
            scoring.add(samples.prompts[20:], list(range(20, 40)), images=samples.images[20:])
            expect(scoring.finish())
        timer.join()
        with again[0]:
            keys = [line["came"] for line in (*first.lines("came"), *again[0].lines("came"))]
            assert len(set(keys)) == 40  # one key per request, however often it was sent


def test_a_stopped_server_is_passed_over_after_half_the_time(tmp_path: Path) -> None:
    with (
        Process("length", tmp_path, name="first", fault="stop") as first,
        Process("length", tmp_path, name="second") as second,
    ):
        engine, _ = far(first.url, second.url, timeout=10)
        began = time.monotonic()
        expect(engine.score(batch(LEVELS)))
        assert time.monotonic() - began > 4.9  # and less than all of it, or else there would be failures
        stuck = {line["came"] for line in first.lines("came")}
        assert stuck <= {line["scored"] for line in second.lines("scored")}


def test_idle_connections_are_dropped_before_the_server_drops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transport_module.KEEPALIVE_SECONDS < 5  # what uvicorn and others keep them for
    monkeypatch.setattr(transport_module, "KEEPALIVE_SECONDS", 0.5)
    script = Script("length")
    with serving(script, keep_alive=1) as url:
        _, reward = far(url, required_fields=["prompt"], retry_attempts=1)
        for pause in (0.0, 0.9, 0.95, 0.98, 1.0, 1.02, 1.1):
            time.sleep(pause)
            assert reward(prompt=["abc"]).rewards.tolist() == [3.0]
    peers = [seen.peer for seen in script.seen]
    assert len(peers) == 7
    assert len(set(peers)) == 7


def test_overload_is_sat_out_by_all_lanes_together() -> None:
    script = Script("length", faults=["patience:0.4"] * 4)
    with serving(script) as url:
        engine, _ = far(url, batch_size=10)
        expect(engine.score(batch(LEVELS)))
    first = script.seen[0].at
    assert len([seen for seen in script.seen if seen.at < first + 0.4]) <= 4  # each lane was told at most once
    assert len(script.seen) == 8


def test_equal_scores_whatever_happens_on_the_way(tmp_path: Path) -> None:
    images = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    samples = batch(LEVELS)
    samples = type(samples)(samples.prompts, samples.groups, samples.latents, images)
    script = Script("fingerprint32")
    with serving(script) as url:
        engine, _ = far(url, required_fields=["image"])
        calm = engine.score(samples)
        script.faults = ["cut", "html:502", "short", "patience:0.05", "swapped", "code:loading"]
        stormy = engine.score(samples)
    assert stormy.failures == ()
    assert torch.equal(calm.scores, stormy.scores)
    assert calm.scores.unique().numel() == 40
