"""Files that appear whole or not at all, and what to say when the system refuses."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tiltflow.errors import CheckpointError


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole file so that a reader or a kill sees either the old content or the new, never a part.

    Text is written as UTF-8 without newline translation; the folder must exist.

    Raises:
        CheckpointError: The system refused; the old file is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        CheckpointError: The system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be made: {error.strerror}; choose another place") from error


def remove(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        CheckpointError: The system refuses.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be removed: {error.strerror}") from error


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; its files are synced by then.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the place of `path` when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # what the umask gives; safetensors narrows it
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        reason = system_error(error)
        if reason is None:
            raise
        raise write_error(path.name, path.parent, reason) from error


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends well, and vanishes otherwise.

    After a kill between the two renames the old folder is `.NAME.former`; the next call puts it back first.

    Raises:
        CheckpointError: The system refused; the old folder is untouched.
    """
    temporary, former = _beside(path)
    try:
        put_back(path)
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask gives; safetensors narrows it
        for file in (file for file in temporary.rglob("*") if file.is_file()):
            file.chmod(mode)
            sync(file)
        exchange(path, temporary, former=former)
        sync(path.parent)
        if former.exists():
            os.rename(former, temporary)  # so that a kill half-way leaves no folder with holes to be put back
            shutil.rmtree(temporary, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = system_error(error)
        if reason is None:
            raise
        raise write_error(path.name, path.parent, reason) from error


def put_back(path: Path) -> None:
    """Put back the old folder that a kill between the two renames of `replacing_folder` left; remove other remains.

    Raises:
        OSError: The system refused.
    """
    temporary, former = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    if former.exists():
        os.rename(former, temporary if path.exists() else path)
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Return where `replacing_folder` makes the new folder, and where the old one is meanwhile."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.former")


def exchange(path: Path, new: Path, *, former: Path) -> None:
    """Move a folder to `path`, and what is there to `former`: a folder cannot be renamed over a full one.

    Raises:
        OSError: The system refused; the old folder is at its place.
    """
    try:
        if path.exists():
            os.rename(path, former)
        os.rename(new, path)
    except BaseException:
        if former.exists() and not path.exists():
            os.rename(former, path)
        raise


def system_error(error: BaseException | None) -> OSError | None:
    """Return the refusal of the operating system behind an error, if there is one.

    safetensors hides it in its text ("... (os error 28)"); a file written inside a checkpoint has already wrapped it.
    """
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
    if isinstance(error, CheckpointError):
        return system_error(error.__cause__)
    return error if isinstance(error, OSError) else None


def write_error(what: str, directory: Path, reason: OSError, *, keep: int | None = None) -> CheckpointError:
    """Say what could not be written and, when the disk is full, what to do about it."""
    text = f"cannot write {what} in {directory}: {reason.strerror or reason}"
    if reason.filename is not None:
        text += f" ({reason.filename})"
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(directory).free if directory.exists() else 0
        text += f" ({free / 2**20:.1f} MiB free after the unfinished files were removed). Free some space"
        if keep is not None and keep > 1:
            text += f", or lower the number of checkpoints kept (now {keep})"
        text += "; the run resumes from the checkpoint before"
    return CheckpointError(text)
