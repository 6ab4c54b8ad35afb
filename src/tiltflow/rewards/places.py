"""Where in somebody's own code an error came from."""

import sysconfig
import traceback
from pathlib import Path

import torch

import tiltflow
from tiltflow.errors import TiltflowError

_OURS = tuple(str(Path(package.__path__[0]).resolve()) for package in (tiltflow, torch))
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"]).resolve())
_INSTALLED = {"site-packages", "dist-packages"}


def with_place(error: BaseException) -> str:
    """Return an error's message with the place that its reader can mend, such as `division by zero (at my.py:26)`.

    That is the innermost frame in a file of the reader's own, or else in an installed package other than tiltflow and
    torch. Where there is neither, and for an error of tiltflow, which says what is wrong by itself, there is no place.
    """
    if isinstance(error, TiltflowError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    candidates = [(frame, Path(frame.filename).resolve()) for frame in frames if not frame.filename.startswith("<")]
    foreign = [(frame, path) for frame, path in candidates if not _is_known(path)]
    own = [(frame, path) for frame, path in foreign if not _INSTALLED & set(path.parts)]
    if not foreign:
        return str(error)
    frame, path = (own or foreign)[-1]
    return f"{error} (at {path.name}:{frame.lineno})"


def _is_known(path: Path) -> bool:
    """Tell whether a file is tiltflow's, torch's or Python's."""
    if any(path.is_relative_to(folder) for folder in _OURS):
        return True
    return path.is_relative_to(_STANDARD) and not _INSTALLED & set(path.parts)
