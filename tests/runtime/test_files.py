"""Folders that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from tiltflow.errors import CheckpointError
from tiltflow.runtime.files import replacing_folder


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
