"""Replies that are kept: in memory, in flight and on disk, and what is never kept."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiltflow.errors import JudgeError, RewardError, UnparsableError
from tiltflow.rewards.replies import DiskReplies, Replies, Reply, request_key

MIB = 2**20


class Judge:
    """Counts how often it is asked."""

    def __init__(self, text: str = "well", hold: Callable[[], object] = lambda: None):
        self.text = text
        self.hold = hold  # called before each answer
        self.asked = 0

    def __call__(self) -> Reply:
        self.asked += 1
        self.hold()
        return Reply(text=self.text, finish_reason="stop", first_tokens={"Yes": -0.25, " no": -9999.0})


def text_of(reply: Reply) -> str:
    return reply.text


def unreadable(reply: Reply) -> str:
    raise UnparsableError(f"cannot read {reply.text}")


class Flights(dict[str, Any]):
    """What is being asked; counts the threads that found their question there."""

    def __init__(self, replies: Replies):
        super().__init__()
        self.found = 0
        replies._flights = self

    def get(self, key: str) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        flight = super().get(key)
        self.found += flight is not None
        return flight

    def wait(self, count: int) -> None:
        """Wait until so many threads have found theirs, at most twenty seconds."""
        end = time.monotonic() + 20
        while self.found < count:
            assert time.monotonic() < end
            time.sleep(0.005)


def only_in(folder: Path, real: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function on files for which another stands in within one folder: other threads have files of theirs."""

    def chosen(path: Any, *arguments: Any, **more: Any) -> Any:
        return (instead if folder in Path(path).parents else real)(path, *arguments, **more)

    return chosen


def at_once(count: int, work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- memory and flight -----------------------------------------------------------------------------------------------


def test_a_reply_is_remembered_until_more_recent_ones_take_its_place() -> None:
    judge, replies = Judge(), Replies(2)
    for key in ("a", "b", "a", "c", "a"):
        assert replies.get(key, judge, text_of) == "well"
    assert judge.asked == 3
    replies.get("b", judge, text_of)  # was used longest ago
    assert judge.asked == 4


def test_a_memory_of_no_size_remembers_nothing() -> None:
    judge, replies = Judge(), Replies(0)
    replies.get("a", judge, text_of)
    replies.get("a", judge, text_of)
    assert judge.asked == 2


def test_of_many_threads_one_asks() -> None:
    replies = Replies(0)
    flights = Flights(replies)
    judge = Judge(hold=lambda: flights.wait(7))
    found: list[str] = []
    at_once(8, lambda: found.append(replies.get("a", judge, text_of)))
    assert (judge.asked, found) == (1, ["well"] * 8)


def test_different_questions_do_not_wait_for_each_other() -> None:
    together = threading.Barrier(6, timeout=20)
    judge, replies = Judge(hold=together.wait), Replies(8)
    keys, found = iter("abcdef"), list[str]()
    at_once(6, lambda: found.append(replies.get(next(keys), judge, text_of)))
    assert (judge.asked, found) == (6, ["well"] * 6)


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    replies, failures = Replies(8), []
    flights = Flights(replies)

    def fail() -> Reply:
        flights.wait(3)
        raise JudgeError("out of reach")

    def ask() -> None:
        try:
            replies.get("a", fail, text_of)
        except RewardError as error:
            failures.append(str(error))

    at_once(4, ask)
    assert failures == ["out of reach"] * 4
    assert replies.get("a", Judge(), text_of) == "well"


def test_an_interrupted_thread_does_not_take_those_with_it_that_wait_for_its_reply() -> None:
    replies, asking, errors = Replies(8), threading.Event(), list[BaseException]()
    flights = Flights(replies)

    def be_interrupted() -> Reply:
        asking.set()
        flights.wait(2)
        raise KeyboardInterrupt

    def ask(judge: Callable[[], Reply]) -> None:
        try:
            replies.get("a", judge, text_of)
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=ask, args=(be_interrupted,))
    first.start()
    assert asking.wait(5)
    at_once(2, lambda: ask(Judge()))
    first.join()
    assert sorted(type(error).__name__ for error in errors) == ["JudgeError", "JudgeError", "KeyboardInterrupt"]
    assert replies.get("a", Judge(), text_of) == "well"


def test_a_reply_that_cannot_be_read_is_asked_for_again() -> None:
    judge, replies = Judge(), Replies(8)
    with pytest.raises(RewardError, match="cannot read well"):
        replies.get("a", judge, unreadable)
    assert replies.get("a", judge, text_of) == "well"
    assert judge.asked == 2


# --- disk ------------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, limit: float = 10 * MIB) -> Replies:
    """Return replies that are kept on disk alone."""
    return Replies(0, DiskReplies(folder, limit=limit))


def test_a_reply_outlives_the_process(tmp_path: Path) -> None:
    judge, folder = Judge(), tmp_path / "made" / "for" / "it"
    key = request_key({"model": "m"})
    assert on_disk(folder).get(key, judge, lambda reply: reply) == judge()
    kept = on_disk(folder).get(key, Judge("another"), lambda reply: reply)
    assert kept == Reply(text="well", finish_reason="stop", first_tokens={"Yes": -0.25, " no": -9999.0})
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.json")] == [f"{key[:2]}/{key}.json"]
    assert list(folder.rglob("*.tmp")) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', "\x00\xff", "cut", "another key"])
def test_a_damaged_file_is_reported_asked_for_again_and_written_anew(tmp_path: Path, damage: str) -> None:
    on_disk(tmp_path).get("abc", Judge(), text_of)
    path = tmp_path / "ab" / "abc.json"
    whole = path.read_text()
    if damage == "cut":
        path.write_text(whole[: len(whole) // 2])
    elif damage == "another key":
        path.write_text(json.dumps({**json.loads(whole), "key": "abd"}))
    else:
        path.write_bytes(damage.encode("latin-1"))
    judge = Judge("anew")
    with pytest.warns(RuntimeWarning, match="abc.json (cannot be read|holds the reply to another request).*is ignored"):
        assert on_disk(tmp_path).get("abc", judge, text_of) == "anew"
    assert on_disk(tmp_path).get("abc", judge, text_of) == "anew"
    assert judge.asked == 1


def test_what_is_no_text_costs_no_reply_and_is_not_kept(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"abc.json cannot be written: .*; this reply is not kept on disk"):
        assert on_disk(tmp_path).get("abc", Judge("half a pair: \ud800"), text_of) == "half a pair: \ud800"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_kept_reply_that_cannot_be_marked_as_used_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk(tmp_path).get("abc", Judge(), text_of)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", only_in(tmp_path, os.utime, refuse))
    assert on_disk(tmp_path).get("abc", Judge("another"), text_of) == "well"


def test_a_limit_that_cannot_be_kept_is_reported_and_costs_no_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = on_disk(tmp_path, 100)
    replies.get("abc", Judge("x" * 200), text_of)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="cannot be kept below its limit"):
        patch.setattr(Path, "unlink", only_in(tmp_path, Path.unlink, refuse))
        assert replies.get("abd", Judge("x" * 200), text_of) == "x" * 200
    assert on_disk(tmp_path).get("abd", Judge("another"), text_of) == "x" * 200


def test_writers_of_one_reply_never_share_a_file_in_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of different machines may have one number, and threads of one number, at the same time."""
    written: list[Path] = []
    write = Path.write_bytes

    def record(self: Path, data: bytes) -> int:
        written.append(self)
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", only_in(tmp_path, write, record))
    for _ in range(8):
        DiskReplies(tmp_path, limit=MIB).put("abc", Reply(text="well"))
    assert len(set(written)) == 8
    assert {path.parent for path in written} == {tmp_path / "ab"}


WRITER = """
import sys, warnings
from pathlib import Path
from tiltflow.rewards.replies import DiskReplies, Replies, Reply

warnings.simplefilter("error")
folder, own = Path(sys.argv[1]), sys.argv[2]
for turn in range(12):
    replies = Replies(0, DiskReplies(folder, limit=200_000))
    for number in range(20):
        key = f"{number:04d}"
        text = f"{key} " * 2000
        assert replies.get(key, lambda: Reply(text=text), lambda reply: reply.text) == text
    for number in range(10):  # more than the folder may hold
        replies.get(f"{own}{turn:02d}{number}", lambda: Reply(text="x" * 9000), lambda reply: reply.text)
"""


def test_processes_write_one_folder_while_others_make_room(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), own], env=environment, stderr=subprocess.PIPE)
        for own in ("a", "b")
    ]
    for writer in writers:
        told = writer.communicate(timeout=240)[1]
        assert writer.returncode == 0, told.decode()
    for path in tmp_path.rglob("*.json"):
        found = json.loads(path.read_text())
        assert found["key"] == path.stem
        if path.stem.startswith("00"):
            assert found["reply"]["text"] == f"{path.stem} " * 2000
    assert list(tmp_path.rglob("*.tmp")) == []


def test_errors_and_unreadable_replies_are_never_written(tmp_path: Path) -> None:
    def fail() -> Reply:
        raise JudgeError("out of reach")

    for ask, read in ((fail, text_of), (Judge(), unreadable)):
        with pytest.raises(RewardError):
            on_disk(tmp_path).get("abc", ask, read)
    assert list(tmp_path.rglob("*")) == []


def test_a_kept_reply_that_cannot_be_read_under_new_options_is_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on_disk(tmp_path).get("abc", Judge("old"), text_of)

    def only_new(reply: Reply) -> str:
        return reply.text if reply.text == "new" else unreadable(reply)

    assert on_disk(tmp_path).get("abc", Judge("new"), only_new) == "new"
    assert "a kept reply is asked for again, for it cannot be read: cannot read old" in caplog.text
    assert on_disk(tmp_path).get("abc", Judge("newer"), text_of) == "new"


def test_a_kept_reply_that_other_code_cannot_read_is_asked_for_again(tmp_path: Path) -> None:
    on_disk(tmp_path).get("abc", Judge("old"), text_of)
    assert on_disk(tmp_path).get("abc", Judge("7"), lambda reply: int(reply.text)) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        on_disk(tmp_path).get("abd", Judge("old"), lambda reply: int(reply.text))


def test_the_folder_is_bounded_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    limit = 64 * 1024
    judge = Judge("x" * 2000)
    replies = on_disk(tmp_path, limit)
    for index in range(20):
        replies.get(f"{index:04d}", judge, text_of)
        os.utime(tmp_path / "00" / f"{index:04d}.json", (index, index))
    on_disk(tmp_path, limit).get("0000", judge, text_of)  # used just now
    assert judge.asked == 20
    for index in range(20, 36):
        replies.get(f"{index:04d}", judge, text_of)
    files = [path.name for path in tmp_path.rglob("*.json")]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.json")) <= limit * (1 + 1 / 16)
    assert len(files) > 20
    assert "0000.json" in files and "0035.json" in files
    assert "0001.json" not in files


def test_files_in_the_making_are_left_alone_until_their_process_must_be_gone(tmp_path: Path) -> None:
    store = DiskReplies(tmp_path, limit=100)
    (tmp_path / "00").mkdir()
    young, old = tmp_path / "00" / ".0001.aa.tmp", tmp_path / "00" / ".0002.bb.tmp"
    for path in (young, old):
        path.write_bytes(b"x" * 200)
    os.utime(old, (1, 1))
    store.put("0003", Reply(text="well"))
    assert (young.exists(), old.exists()) == (True, False)


def test_files_of_other_processes_count_too(tmp_path: Path) -> None:
    first, second = on_disk(tmp_path, 32 * 1024), on_disk(tmp_path, 32 * 1024)
    judge = Judge("x" * 2000)
    for index in range(40):
        (first, second)[index % 2].get(f"{index:04d}", judge, text_of)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.json")) <= 32 * 1024 * (1 + 2 / 16)


def test_a_disk_that_cannot_be_written_costs_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = on_disk(tmp_path)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", only_in(tmp_path, os.replace, full))
    with pytest.warns(RuntimeWarning, match="abc.json cannot be written: .*No space left on device; this reply"):
        assert replies.get("abc", Judge(), text_of) == "well"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match=r"cache_dir='.*file/inside' cannot be made: .*; name a folder that can"):
        DiskReplies(tmp_path / "file" / "inside", limit=MIB)


def test_threads_and_processes_write_one_folder(tmp_path: Path) -> None:
    stores = [on_disk(tmp_path) for _ in range(4)]
    keys = [f"{index:04d}" for index in range(40)]
    found: list[bool] = []

    def work() -> None:
        for key in keys:
            for store in stores:
                found.append(store.get(key, Judge(key), text_of) == key)

    at_once(6, work)
    assert found == [True] * 960
    assert len(list(tmp_path.rglob("*.json"))) == 40
    assert list(tmp_path.rglob("*.tmp")) == []


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_content_in_whatever_order_it_was_written() -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "grün"}], "temperature": 0.1}
    key = request_key(request)
    assert len(key) == 64
    assert request_key(dict(reversed(request.items()))) == key
    others = [{**request, "model": "n"}, {**request, "temperature": 0.2}, {**request, "messages": []}]
    assert len({key, *(request_key(other) for other in others)}) == 4
