"""What judges replied, kept so that the same question is asked once: in memory, in flight and, if wanted, on disk."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import ValidationError

from tiltflow.errors import JudgeError, RewardError
from tiltflow.types import Config

T = TypeVar("T")

_log = logging.getLogger(__name__)

FORMAT: Final = 2  # of the files; another format is another key, so that old files are never misread
KEPT_AFTER_PRUNING: Final = 0.9  # of the limit
ABANDONED: Final = 600.0  # seconds after which a file in the making is one that a killed process left
COUNT_AGAIN: Final = 1 / 16  # of the limit: after so many bytes written, other processes' files are counted too


class Reply(Config):
    """One answer of a judge, as far as rewards read it.

    Example: `Reply(text="Yes", finish_reason="stop", first_tokens={"Yes": -0.1, "No": -2.4})`.
    """

    text: str  # empty if there was none
    finish_reason: str | None = None  # "stop", or "length" for an answer that was cut off
    first_tokens: Mapping[str, float] | None = None  # likely first tokens -> log-probability; None: not told


class _Entry(Config):
    """One file of the cache on disk."""

    format: Literal[2] = FORMAT
    key: str
    reply: Reply


def request_key(request: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of a request: model, messages with their images, and sampling settings.

    Where the judge answers, with what key and how patiently, is no part of a request.
    """
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(f"tiltflow-judge-{FORMAT}\n{text}".encode()).hexdigest()


class Replies:
    """Asks a judge only what it was not asked before; threads may share it.

    A reply that cannot be read is forgotten at once, like an error: the next time the judge is asked again.
    """

    def __init__(self, size: int, disk: "DiskReplies | None" = None):
        """Start with an empty memory.

        Args:
            size: How many replies to remember, those not used for longest being forgotten; 0 for none.
            disk: Where replies outlive the process, or None.
        """
        self._size = size
        self._disk = disk
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, Reply] = OrderedDict()
        self._flights: dict[str, Future[Reply]] = {}

    def get(self, key: str, ask: Callable[[], Reply], read: Callable[[Reply], T]) -> T:
        """Return what `read` makes of the reply to a request.

        Of threads that want the same reply at the same time one asks, and the others wait for it.

        Args:
            key: Of the request (`request_key`).
            ask: Sends it.
            read: Makes something of a reply, or raises JudgeError.

        Raises:
            JudgeError: As `read`, of a new reply.
            Exception: As `ask`.
        """
        with self._lock:
            known = self._memory.get(key)
            if known is not None:
                self._memory.move_to_end(key)
            flight = self._flights.get(key)
            mine = known is None and flight is None
            if mine:
                flight = self._flights[key] = Future()
        if known is not None:
            return read(known)
        assert flight is not None
        if not mine:
            return read(flight.result())
        try:
            reply, answer = self._find(key, ask, read)
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            # Those who wait are not to end as a thread does that is interrupted.
            passed_on = error if isinstance(error, Exception) else JudgeError("the thread that asked was interrupted")
            flight.set_exception(passed_on)
            raise
        with self._lock:
            del self._flights[key]
            self._remember(key, reply)
        flight.set_result(reply)
        return answer

    def _find(self, key: str, ask: Callable[[], Reply], read: Callable[[Reply], T]) -> tuple[Reply, T]:
        kept = None if self._disk is None else self._disk.get(key)
        if kept is not None:
            try:
                return kept, read(kept)
            except Exception as error:  # whatever a subclass makes of it; it was readable under other options or code
                # A new reply may be readable now; if it is not, that is raised.
                _log.warning("a kept reply is asked for again, for it cannot be read: %s", error)
        reply = ask()
        answer = read(reply)
        if self._disk is not None:
            self._disk.put(key, reply)
        return reply, answer

    def _remember(self, key: str, reply: Reply) -> None:
        if self._size:
            self._memory[key] = reply
            if len(self._memory) > self._size:
                self._memory.popitem(last=False)


class DiskReplies:
    """Replies as files of one folder, which processes may share; the least recently used go when it grows too large."""

    def __init__(self, folder: Path, *, limit: float):
        """Make the folder.

        Args:
            folder: Holds `<two digits>/<key>.json`.
            limit: Bytes of all files together. It may be exceeded by a sixteenth per process.

        Raises:
            RewardError: The folder cannot be made or written to.
        """
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._written: float | None = None  # bytes since the files were counted; None: they never were
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RewardError(
                f"cache_dir={str(folder)!r} cannot be made: {error.strerror}; name a folder that can, or leave it out"
            ) from error
        if not os.access(folder, os.W_OK):
            raise RewardError(f"cache_dir={str(folder)!r} cannot be written to; name another folder, or leave it out")

    def get(self, key: str) -> Reply | None:
        """Return a reply, or None; a file that cannot be read is reported and counts as absent."""
        path = self._path(key)
        try:
            entry = _Entry.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            self._warn(f"{path} cannot be read ({type(error).__name__}) and is ignored; the judge is asked again")
            return None
        if entry.key != key:
            self._warn(f"{path} holds the reply to another request and is ignored; the judge is asked again")
            return None
        # Another process may have removed it, or it is another user's: it was read all the same.
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now: the last to be removed
        return entry.reply

    def put(self, key: str, reply: Reply) -> None:
        """Write a reply, whole or not at all; if the system refuses, that is reported and the reply is not kept."""
        path = self._path(key)
        # A name that no other process has, on whichever machine: the folder may be shared by several.
        temporary = path.with_name(f".{key}.{secrets.token_hex(8)}.tmp")
        try:
            data = _Entry(key=key, reply=reply).model_dump_json().encode()
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)  # no sync: a file that a power cut leaves empty is ignored by `get`
        except (OSError, ValueError) as error:  # ValueError: text that is no Unicode, such as half a surrogate pair
            with contextlib.suppress(OSError):  # what is left is removed with the oldest files
                temporary.unlink(missing_ok=True)
            self._warn(f"{path} cannot be written: {error}; this reply is not kept on disk")
            return
        try:
            self._make_room(len(data))
        except OSError as error:
            self._warn(f"cache_dir={str(self._folder)!r} cannot be kept below its limit: {error}")

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._written is not None and self._written + size <= COUNT_AGAIN * self._limit:
                self._written += size
                return
            self._written = 0.0
            self._prune()

    def _prune(self) -> None:
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("??/*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if path.suffix == ".tmp" and time.time() - found.st_mtime < ABANDONED:
                continue  # another process is writing it just now
            files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self._limit:
            return
        for _, size, path in sorted(files):
            path.unlink(missing_ok=True)
            total -= size
            if total <= KEPT_AFTER_PRUNING * self._limit:
                return

    def _warn(self, message: str) -> None:
        warnings.warn(f"replies of judges: {message}", RuntimeWarning, stacklevel=3)
