"""Folders that appear whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tiltflow.errors import CheckpointError
from tiltflow.runtime.files import exchange, replacing_folder


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for text in ("old", "new"):
        with replacing_folder(target) as temporary:
            assert list(temporary.iterdir()) == []
            (temporary / "inner").mkdir()
            file = temporary / "inner" / f"{text}.txt"
            file.write_text(text)
            file.chmod(0o600)
    assert [path.name for path in target.rglob("*.txt")] == ["new.txt"]
    assert os.listdir(tmp_path / "deep") == ["model"]
    assert stat.S_IMODE((target / "inner" / "new.txt").stat().st_mode) == target.stat().st_mode & 0o666


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("mistake")])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "old").touch()
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), replacing_folder(tmp_path / "model") as temporary:
        (temporary / "half").touch()
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    for name in (".model.tmp", ".model.former"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").touch()
    with replacing_folder(tmp_path / "model") as temporary:
        assert list(temporary.iterdir()) == []
    assert os.listdir(tmp_path) == ["model"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".model.former").mkdir()
    (tmp_path / ".model.former" / "old").touch()
    with pytest.raises(CheckpointError), replacing_folder(tmp_path / "model"):
        raise OSError(errno.EIO, "Input/output error")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_the_old_folder_returns_when_the_new_one_cannot_be_moved(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "model", tmp_path / "lost", former=tmp_path / ".model.former")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_a_kill_at_any_call_leaves_one_whole_folder(tmp_path: Path) -> None:
    code = f"""
import os, shutil, signal
from pathlib import Path
from tiltflow.runtime.files import replacing_folder

def deadly(function):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

def fill(folder, text):
    for name in ("a", "b"):
        (folder / name).write_text(text)

for left in range(1, 100):
    path = Path({str(tmp_path)!r}) / f"killed_{{left}}" / "model"
    path.mkdir(parents=True)
    fill(path, "old")
    child = os.fork()
    if child == 0:
        for name in ("mkdir", "rename", "rmdir", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        with replacing_folder(path) as temporary:
            fill(temporary, "new")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found: list[set[str]] = []
    for place in sorted(tmp_path.iterdir(), key=lambda place: int(place.name.removeprefix("killed_"))):
        with pytest.raises(ValueError), replacing_folder(place / "model"):
            raise ValueError("nothing new")
        assert os.listdir(place) == ["model"]
        found.append({(place / "model" / name).read_text() for name in ("a", "b")})
    assert len(found) > 6 and found == sorted(found, key=lambda texts: texts == {"new"})
    assert found[0] == {"old"} and found[-1] == {"new"} and all(len(texts) == 1 for texts in found)
