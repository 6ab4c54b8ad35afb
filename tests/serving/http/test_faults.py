"""What a model does wrong, seen from the other end of the connection."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http.servers import Answer, Server, at_once, b64, busy, codes, faulty, picture, scores


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "calls.jsonl"
    path.touch()
    return path


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Server]:
    with faulty(batch_size=64, batch_seconds=2.0, log=str(log)) as running:
        yield running


def calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_is_an_error_of_its_item(server: Server, word: str) -> None:
    answer = server.score(["1", word, "3"])
    assert answer.status == 200
    assert scores(answer) == [1.0, None, 3.0]
    assert codes(answer) == ["ok", "nonfinite_score", "ok"]
    assert b'"score":null' not in answer.body and b"NaN" not in answer.body


def test_alone_it_is_the_request_that_fails(server: Server) -> None:
    answer = server.score(["nan"])
    assert (answer.status, answer.error["code"]) == (500, "nonfinite_score")
    assert codes(answer) == ["nonfinite_score"]


def test_a_wrong_count_assigns_nothing(server: Server) -> None:
    answer = server.score(["1", "short", "3"])
    assert (answer.status, answer.error["code"]) == (500, "wrong_count")
    assert "2 values for 3 samples" in answer.error["message"]
    assert "results" not in answer.json


def test_one_poison_item_among_64(server: Server) -> None:
    prompts = [str(index) for index in range(64)]
    prompts[37] = "poison"
    answer = server.score(prompts)
    assert answer.status == 200
    assert answer.json["counts"] == {"ok": 63, "error": 1}
    assert codes(answer)[37] == "scorer_error"
    assert [score for index, score in enumerate(scores(answer)) if index != 37] == [i for i in range(64) if i != 37]
    assert "this one cannot be scored" in answer.json["results"][37]["error"]["message"]


def test_partial_forbid_fails_the_request_and_still_tells_the_results(server: Server) -> None:
    answer = server.score(["1", "poison"], partial="forbid")
    assert (answer.status, answer.error["code"]) == (500, "scorer_error")
    assert codes(answer) == ["ok", "scorer_error"]


def test_out_of_memory_is_tried_with_less(server: Server, log: Path) -> None:
    before = len(calls(log))
    answer = server.score(["memory=4"] * 16)
    assert answer.status == 200 and scores(answer) == [4.0] * 16
    sizes = [len(call) for call in calls(log)[before:]]
    assert sizes[0] == 16 and sum(size for size in sizes if size <= 4) == 16


def test_a_judge_that_does_not_answer_is_a_bad_gateway_and_no_score(server: Server) -> None:
    answer = server.score(["judge"])
    assert (answer.status, answer.error["code"], answer.error["retryable"]) == (502, "upstream_judge", True)
    assert scores(answer) == [None]


def test_a_hanging_model_is_replaced(server: Server) -> None:
    workers = server.descendants()
    answer = server.score(["hang"], headers={"X-Request-Timeout-Ms": "30000"})
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert 1.5 < answer.seconds < 8
    server.wait_ready()
    assert scores(server.score(["5"])) == [5.0]
    assert set(server.descendants()) != set(workers)


def test_a_deadline_is_kept_while_the_model_computes(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with faulty() as server:
        answer = server.score([f"until={go}"], headers={"X-Request-Timeout-Ms": "300"})
        assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
        go.touch()
        assert scores(server.score(["5"])) == [5.0]


def test_a_lost_worker_is_told_and_replaced_and_three_times_is_the_end() -> None:
    with faulty() as server:
        for word in ("kill=1", "segfault"):
            answer = server.score([word])
            assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "worker_lost", True)
            server.wait_ready()
            assert scores(server.score(["7"])) == [7.0]
        assert server.score(["kill=2"]).status == 503
        deadline = time.monotonic() + 10
        while server.get("/v1/models/Faulty").json["state"] != "FAILED":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = server.score(["7"])
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "model_failed", False)
        ready = server.get("/readyz")
        assert (ready.status, ready.json["models"]) == (503, {"Faulty": "FAILED"})
        assert server.get("/livez").status == 200
        assert server.get("/v1/models/Faulty/ready").status == 503


def test_sigterm_under_load_loses_nothing_and_leaves_no_process(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    log.touch()
    with faulty(batch_size=1, log=str(log)) as server:
        family = server.descendants()

        def ask(index: int) -> tuple[int, list[float | None]]:
            if index == 8:
                server.wait_queued(8)
                server.signal(signal.SIGTERM)
                time.sleep(0.2)
                (tmp_path / "go").touch()
                return 200, []
            answer = server.score([f"sleep=0.1{index}"])
            return answer.status, scores(answer)

        with busy(server, log, tmp_path):
            answers = at_once(9, ask)
        assert [status for status, _ in answers] == [200] * 9
        assert [told for _, told in answers[:8]] == [[float(f"0.1{index}")] for index in range(8)]
        server.process.wait(15)
    assert family
    gone(family)


def test_a_killed_server_leaves_no_process() -> None:
    with faulty() as server:
        family = server.descendants()
        server.signal(signal.SIGKILL)
        server.process.wait(10)
        assert family
        gone(family)


def gone(family: list[int]) -> None:
    """Wait until none of some processes runs."""
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Tell whether a process runs; what nobody has collected yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_constructor_that_fails_ends_the_server_with_its_message() -> None:
    with faulty(setup_error="no such weights", ready=False) as server:
        assert server.process.wait(20) == 1
    assert "Faulty: RuntimeError: no such weights" in server.lines[-1]


def test_a_full_queue_turns_away_at_once_and_answers_what_it_took(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    log.touch()
    with faulty(batch_size=1, limits={"queue_items": 4}, log=str(log)) as server:

        def ask(index: int) -> Answer:
            if index < 4:
                return server.score([str(index)])
            server.wait_queued(4)
            shed = server.score(["7"])
            (tmp_path / "go").touch()
            return shed

        with busy(server, log, tmp_path):
            *taken, shed = at_once(5, ask)
    assert (shed.status, shed.error["code"]) == (429, "overloaded") and int(shed.headers["retry-after"]) >= 1
    assert [scores(answer) for answer in taken] == [[0.0], [1.0], [2.0], [3.0]]


@pytest.mark.slow  # and needs a machine that does little else
def test_overload_is_turned_away_at_once_and_what_was_taken_is_in_time() -> None:
    """Ten times more pictures than 20 calls of 4 a second can take, with a deadline of a second."""
    item = {"prompt": "sleep=0.05", "image": b64(picture(side=128))}
    body = json.dumps({"items": [item]}).encode()
    told = {"Content-Type": "application/json", "X-Request-Timeout-Ms": "1000"}
    with faulty(batch_size=1, limits={"queue_items": 16}) as server:
        for _ in range(3):  # so that the server knows how long a call takes
            server.ask("POST", "/v1/score", body, headers=told)
        end = time.monotonic() + 4.0

        def client(_: int) -> list[Answer]:
            answers: list[Answer] = []
            while time.monotonic() < end:
                answers.append(server.ask("POST", "/v1/score", body, headers=told))
                time.sleep(0.05)
            return answers

        answers = [answer for each in at_once(40, client) for answer in each]
        shed = sorted(answer.seconds for answer in answers if answer.status == 429)
        taken = sorted(answer.seconds for answer in answers if answer.status == 200)
        late = [answer for answer in answers if answer.status == 504]
        assert len(shed) + len(taken) + len(late) == len(answers)
        assert len(answers) > 8 * len(taken) and len(taken) > 30
        assert len(late) <= 0.01 * len(taken) + 1
        assert taken[int(0.99 * len(taken))] < 1.2
        assert shed[len(shed) // 2] < 0.05, (shed[0], shed[len(shed) // 2], shed[-1])  # on a machine that does more
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status == 429)
