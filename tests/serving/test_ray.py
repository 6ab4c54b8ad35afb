"""`tiltflow serve --engine ray` over a real Ray on this machine, and what it refuses before there is one."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.serving.helpers import is_running
from tests.serving.http.servers import HERE, ROOT, START_SECONDS, Answer, Server, at_once, listening, scores
from tiltflow import cli
from tiltflow.errors import ConfigError
from tiltflow.rewards import RewardArguments, RewardEngine
from tiltflow.serving import ray_engine
from tiltflow.serving.ray_engine import RaySettings, run_on_ray
from tiltflow.serving.settings import ServerSettings
from tiltflow.types import Prompt

REWARDS = "tests.serving.http.rewards"
JPEG = "JPEGCompressibility"
END_SECONDS = 60.0
SCALING_SECONDS = 150.0  # Ray waits half a minute to be sure of the load, and a replica must be made
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -c constraints.txt '.[ray]'")


@pytest.fixture(autouse=True)
def clean() -> None:
    """Take the place of the check for this process: the workers are other processes', and a test looks for those."""


# --- without Ray ------------------------------------------------------------------------------------------------------


def test_a_missing_ray_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    assert cli.main(["serve", JPEG, "--engine", "ray", "--port", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "(ray): pip install 'tiltflow[ray]'" in captured.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_replicas": 0}, "min_replicas=0: use 1 or more"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2: use min_replicas=3 or more"),
        ({"num_cpus": -1.0}, "num_cpus=-1.0: use 0 or more"),
        ({"num_gpus": float("nan")}, "num_gpus=nan"),
        ({"target_ongoing_requests": 0.0}, "target_ongoing_requests=0.0: use a number above 0"),
        ({"address": "ray://head:10001"}, "address='ray://head:10001': use host:port"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RaySettings(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min_replicas", "2"], "--min_replicas needs --engine ray"),
        (["--engine", "ray", "--max_replicas", "0"], "max_replicas=0"),
        (["--engine", "ray", "--host", "0.0.0.0"], "can be reached from other machines, and there is no token"),
        (["--engine", "ray", "--address", "auto", "--port", "0"], "port=0 with address='auto'"),
    ],
)
def test_words_that_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", JPEG, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_ray_starts() -> None:
    with listening() as port, pytest.raises(ConfigError, match=f"port={port}: cannot listen there"):
        run_on_ray([], ServerSettings(port=port), RaySettings())


# --- with Ray ---------------------------------------------------------------------------------------------------------


def command(*words: str, folder: str) -> "tuple[list[str], dict[str, str]]":
    """Return a command and its environment: one that leaves Ray's logs and token in `folder`."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "HOME": folder,
        "RAY_TMPDIR": folder,  # a short path, or its sockets have names that are too long
    }
    return [sys.executable, "-m", "tiltflow", "serve", *words, "--engine", "ray", "--num_cpus", "0.2"], environ


@contextlib.contextmanager
def on_ray(*words: str) -> Iterator[Server]:
    """Serve with Ray until the end of the block."""
    with listening() as port:
        pass  # free again
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        said, environ = command(*words, "--port", str(port), "--drain_seconds", "8", folder=folder)
        with subprocess.Popen(
            said, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, cwd=HERE
        ) as process:
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
            reader.start()
            try:
                end = time.monotonic() + START_SECONDS
                while not any("listening on" in line for line in lines):
                    assert time.monotonic() < end and process.poll() is None, lines
                    time.sleep(0.05)
                yield Server(process, port, lines)
            finally:
                process.terminate()
                process.wait(END_SECONDS)
                reader.join(5)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serve two rewards in two replicas."""
    with on_ray(JPEG, f"{REWARDS}.Mortal", "--min_replicas", "2") as running:
        yield running


def ask(server: Server, prompts: Sequence[str]) -> Answer:
    return server.score(prompts, models=["Mortal"])


@pytest.mark.slow
@needs_ray
def test_it_is_ready_when_it_says_where_it_is(server: Server) -> None:
    assert server.get("/readyz").json == {"status": "ok", "models": {JPEG: "READY", "Mortal": "READY"}}
    assert f"tiltflow: listening on http://127.0.0.1:{server.port} ({JPEG}, Mortal)\n" in server.lines


@pytest.mark.slow
@needs_ray
def test_remote_scores_are_those_of_one_process(server: Server) -> None:
    images = torch.rand(12, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    options = {"server_url": f"http://127.0.0.1:{server.port}", "model": JPEG, "required_fields": ["image"]}
    found = []
    for arguments in (
        RewardArguments(name="r", reward_model=JPEG),
        RewardArguments(name="r", reward_model="RemotePointwiseRewardModel", batch_size=2, options=options),
    ):
        with RewardEngine([arguments]).begin() as scoring:
            scoring.add([Prompt("p")] * 12, [0] * 12, images=images)
            table = scoring.finish()
        assert table.failures == ()
        found.append(table.column("r").tolist())
    assert found[0] == found[1] and len(set(found[0])) > 1


@pytest.mark.slow
@needs_ray
def test_two_replicas_answer(server: Server) -> None:
    answers = [server.get("/livez") for _ in range(40)]
    assert len({answer.headers["x-replica-id"] for answer in answers}) == 2


@pytest.mark.slow
@needs_ray
def test_the_request_id_is_told_back_once(server: Server) -> None:
    assert server.get("/livez", **{"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert "," not in server.get("/livez").headers["x-request-id"]


@pytest.mark.slow
@needs_ray
def test_errors_are_those_of_the_application(server: Server) -> None:
    assert server.score(["a"], models=["Nothing"]).error["code"] == "model_not_found"
    body = b"x" * (65 * 2**20)
    answer = server.ask("POST", "/v1/score", body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
    late = server.ask(
        "POST",
        "/v1/score",
        b'{"models": ["Mortal"], "items": [{"prompt": "sleep=3"}]}',
        headers={"Content-Type": "application/json", "X-Request-Timeout-Ms": "1500"},
    )
    assert (late.status, late.error["code"]) == (504, "deadline_exceeded")


@pytest.mark.slow
@needs_ray
def test_a_replica_whose_model_has_failed_is_replaced(server: Server) -> None:
    before = {server.get("/livez").headers["x-replica-id"] for _ in range(40)}
    failed = None
    tries = 0
    end = time.monotonic() + END_SECONDS
    while failed is None:
        assert time.monotonic() < end
        tries += 1
        answer = ask(server, [f"die={tries}"])  # another one each time: the same would be refused the third time
        if answer.error["code"] == "model_failed":
            failed = answer.headers["x-replica-id"]
    assert failed in before
    while True:
        assert time.monotonic() < end, server.lines
        answers = [server.get("/readyz") for _ in range(20)]
        found = {answer.headers.get("x-replica-id") for answer in answers}
        if {answer.status for answer in answers} == {200} and failed not in found and len(found) == 2:
            break
        time.sleep(0.5)
    assert scores(ask(server, ["four"])) == [4.0]


@pytest.mark.slow
@needs_ray
def test_sigterm_finishes_what_is_in_flight_and_leaves_nothing(server: Server) -> None:
    family = server.descendants()
    assert len(family) > 6  # Ray's own, two replicas, and two workers of each
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(ask(server, ["sleep=3"])))
    asking.start()
    time.sleep(1.0)
    server.signal(signal.SIGTERM)
    asking.join(END_SECONDS)
    assert [scores(answer) for answer in answers] == [[7.0]]
    assert server.process.wait(END_SECONDS) == 0, server.lines
    end = time.monotonic() + 5
    while any(map(is_running, family)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [pid for pid in family if is_running(pid)] == []
    assert not any("Traceback" in line for line in server.lines if not line.startswith("("))


@pytest.mark.slow
@needs_ray
def test_a_model_that_cannot_be_made_ends_it_with_the_reason() -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        words, environ = command(f"{REWARDS}.Unmade", "--port", "0", folder=folder)
        done = subprocess.run(words, capture_output=True, text=True, env=environ, cwd=HERE, timeout=START_SECONDS)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tiltflow serve: Unmade: ") and "the weights are torn" in last
    assert "listening on" not in done.stdout


@pytest.mark.slow
@needs_ray
def test_load_starts_another_replica() -> None:
    scaling = ("--min_replicas", "1", "--max_replicas", "2", "--target_ongoing_requests", "1")
    with on_ray(f"{REWARDS}.Mortal", *scaling) as server:
        before = {server.get("/livez").headers["x-replica-id"] for _ in range(20)}
        assert len(before) == 1
        end = time.monotonic() + SCALING_SECONDS
        enough = threading.Event()
        found: set[str] = set()
        failed: list[Answer] = []

        def client(number: int) -> None:
            count = 0
            while not enough.is_set() and time.monotonic() < end:
                count += 1
                answer = ask(server, [f"sleep=0.5{number}{count:04}"])
                if answer.status == 200:
                    found.add(answer.headers["x-replica-id"])
                elif answer.error["code"] != "loading":  # the new replica, for a moment
                    failed.append(answer)
                    return
                if len(found) > 1:
                    enough.set()

        at_once(6, client)
        assert failed == [], server.lines
        assert len(found) == 2 and before < found, (before, found, server.lines)
