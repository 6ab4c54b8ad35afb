"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder `epoch_000012`, or `step_000012` of a run that counts steps, with a `manifest.json` that lists
the size and sha256 of every file. It is built
under a hidden name and appears by one rename, so a folder with a manifest is complete unless it was damaged later; the
link `latest` points to the newest. Nothing is pickled: tensors go to safetensors, everything else to JSON.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.runtime.files import exchange, sync, system_error, write_atomically, write_error
from tiltflow.runtime.state import flatten_state, load_state, load_tensors, save_state, save_tensors, unflatten_state
from tiltflow.types import Config

__all__ = [
    "CheckpointStore",
    "flatten_state",
    "load_state",
    "load_tensors",
    "save_state",
    "save_tensors",
    "unflatten_state",
    "verify_checkpoint",
    "write_atomically",
]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# `.replaced` holds the former folder of an epoch for the moment in which the new one takes its name.
_FOLDER = re.compile(r"^(?:(?:epoch|step)_(\d{6,})|\.(?:epoch|step)_(\d{6,})\.replaced)$")


class _File(Config):
    path: str  # relative to the checkpoint, with forward slashes
    size: int  # bytes
    sha256: str


class _Manifest(Config):
    version: int
    epoch: int  # or step
    files: list[_File]


class CheckpointStore:
    """The checkpoints of one run: written atomically, verified before use, the newest few kept.

    Only one process may save. Saving epoch N says that the run has now reached N: checkpoints of later epochs, left
    by a continuation that was given up, are removed too.

    Args:
        directory: The folder of the run; made at the first save.
        keep: How many checkpoints to keep, at least 1; while saving, the disk must hold one more.
        unit: What the run counts; a folder holds checkpoints of one unit.

    Raises:
        ConfigError: `keep` is below 1.
    """

    def __init__(self, directory: Path, *, keep: int = 2, unit: Literal["epoch", "step"] = "epoch") -> None:
        if keep < 1:
            raise ConfigError(f"keep={keep}: at least 1 checkpoint must be kept; set it to 1 or more (default 2)")
        self.directory = Path(directory)
        self.keep = keep
        self.unit = unit

    def save(self, epoch: int, write: Callable[[Path], None]) -> Path:
        """Write one checkpoint, repoint `latest` to it, then remove those that are no longer kept.

        Args:
            epoch: The number of the checkpoint, at least 0; an existing one of this number is replaced.
            write: Fills the empty folder that it is given; `manifest.json` is added afterwards.

        Returns:
            The finished folder.

        Raises:
            CheckpointError: The system refused (disk full, no permission); earlier checkpoints are untouched. Any
                other exception of `write` is passed on after the unfinished folder is removed.
        """
        if epoch < 0:
            raise ConfigError(f"epoch={epoch}: a checkpoint number must be 0 or more")
        final = self._folder(epoch)
        temporary = self.directory / f".{final.name}.{os.getpid()}.tmp"
        latest = self.directory / "latest"
        if latest.exists() and not latest.is_symlink():
            raise CheckpointError(
                f"{latest} is a folder or file where a link to the newest checkpoint belongs; move it"
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean_up_after_a_kill()
            temporary.mkdir()
            write(temporary)
            _seal(temporary, epoch)
            self._publish(temporary, final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = system_error(error)
            if reason is None:
                raise
            raise write_error(f"checkpoint {final.name}", self.directory, reason, keep=self.keep) from error
        try:
            self._prune(epoch)
        except OSError as error:
            raise write_error(f"the removal of checkpoints older than {final.name}", self.directory, error) from error
        return final

    def has(self, epoch: int) -> bool:
        """Tell whether there is a checkpoint of this number; it is not verified."""
        return (self._folder(epoch) / MANIFEST).is_file()

    def latest(self, *, on_skip: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint whose files all verify.

        The link `latest` is a convenience for people, not the truth: a kill just before it is repointed leaves it at
        the checkpoint before, so every folder is considered.

        Args:
            on_skip: Called for each newer checkpoint that is damaged, with what is wrong and what is used instead.

        Returns:
            The folder, or None when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, but none is intact.
        """
        problems: list[str] = []
        folders = self._folders()
        link = self.directory / "latest"
        if link.is_symlink() and not link.exists():
            problems.append(f"{link} points to {os.readlink(link)}, which does not exist")
        for folder in folders:
            problem = _problem(folder)
            if problem is None:
                for message in problems:
                    on_skip(f"{message}; using {folder.name} instead")
                return folder
            problems.append(f"{folder} {problem}")
        if folders:
            listing = "\n  ".join(problems)
            raise CheckpointError(
                f"none of the {len(folders)} checkpoints in {self.directory} is intact:\n  {listing}\n"
                "restore one from a copy, or start anew in another folder"
            )
        for message in problems:
            on_skip(f"{message}; {self.directory} holds no checkpoint")
        return None

    def _folder(self, number: int) -> Path:
        return self.directory / f"{self.unit}_{number:06d}"

    def _folders(self) -> list[Path]:
        """Return the checkpoint folders, newest first; a finished one before the one it was about to replace."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _FOLDER.match(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: (_number(path), not path.name.startswith(".")), reverse=True)

    def _clean_up_after_a_kill(self) -> None:
        for path in self.directory.glob(f".{self.unit}_*.tmp"):
            # What cannot be removed now (an open file on NFS) is tried again at the next save.
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob(f".{self.unit}_*.replaced"):
            name = self._folder(_number(path))
            if name.exists():
                self._discard(path)
            else:
                os.rename(path, name)

    def _publish(self, temporary: Path, final: Path) -> None:
        aside = self.directory / f".{final.name}.replaced"  # a name that `latest` also reads
        exchange(final, temporary, former=aside)
        link = self.directory / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.directory / "latest")
        sync(self.directory)
        if aside.exists():
            self._discard(aside)

    def _prune(self, epoch: int) -> None:
        current = [path for path in self._folders() if _number(path) <= epoch]
        kept = set(current[: self.keep])
        for path in self._folders():
            if path not in kept:
                self._discard(path)

    def _discard(self, path: Path) -> None:
        # Renamed first, so that a kill half-way leaves no checkpoint with holes.
        doomed = self.directory / f".{self._folder(_number(path)).name}.{os.getpid()}.tmp"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def verify_checkpoint(path: Path) -> None:
    """Check that a checkpoint is complete: every file of its manifest is there with its size and sha256.

    Raises:
        CheckpointError: It is no checkpoint, or it is damaged; the message says which file and how.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is not a tiltflow checkpoint: no {MANIFEST}; expected a folder such as outputs/<run>/latest"
        )
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(f"{path} {problem}; use another checkpoint of the run, or restore this one from a copy")


def _number(folder: Path) -> int:
    match = _FOLDER.match(folder.name)
    assert match is not None, folder
    return int(match[1] or match[2])


def _seal(folder: Path, epoch: int) -> None:
    """Add the manifest to a finished folder and force everything in it to the disk."""
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"the checkpoint writer made a file {MANIFEST}; that name is taken, choose another")
    # safetensors makes its files readable by their owner alone; they get the permissions the user asked for by umask.
    mode = folder.stat().st_mode & 0o666
    records: list[_File] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(mode)
        sync(path)
        name = path.relative_to(folder).as_posix()
        records.append(_File(path=name, size=path.stat().st_size, sha256=_sha256(path)))
    manifest = _Manifest(version=FORMAT_VERSION, epoch=epoch, files=records)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def _problem(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, as the rest of a sentence about it, or None."""
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
        if isinstance(raw, dict) and raw.get("version", FORMAT_VERSION) != FORMAT_VERSION:  # pyright: ignore
            return f"has format version {raw['version']}, this tiltflow reads version {FORMAT_VERSION}"
        manifest = _Manifest.model_validate(raw)
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError) as error:  # a pydantic ValidationError is a ValueError
        return f"has a damaged {MANIFEST}: {str(error).splitlines()[0]}"
    real = folder.resolve()
    if _FOLDER.match(real.name) and _number(real) != manifest.epoch:
        return f"has a {MANIFEST} of epoch {manifest.epoch}: the folder was renamed or the manifest is damaged"
    for record in manifest.files:
        try:
            size = (folder / record.path).stat().st_size
            if size != record.size:
                change = "is truncated" if size < record.size else "has grown"
                return f"is damaged: {record.path} {change} from {record.size} to {size} bytes"
            if _sha256(folder / record.path) != record.sha256:
                return f"is damaged: the checksum of {record.path} differs from the manifest"
        except FileNotFoundError:
            return f"is incomplete: the file {record.path} is missing"
        except OSError as error:
            return f"is damaged: {record.path} cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
