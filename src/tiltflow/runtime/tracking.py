"""Where the numbers and images of a run go: a JSONL file always; TensorBoard, wandb and trackio when asked for.

Only the main process builds trackers. Their steps are epochs; a resumed run repeats no step of the JSONL file.
"""

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from tiltflow.errors import CheckpointError, ConfigError, DataError
from tiltflow.runtime.files import make_folder, write_atomically
from tiltflow.runtime.progress import ProgressBar
from tiltflow.types import Config

__all__ = [
    "JsonlTracker",
    "ProgressBar",
    "TensorBoardTracker",
    "Tracker",
    "TrackerGroup",
    "TrackingConfig",
    "TrackioTracker",
    "WandbTracker",
    "build_trackers",
    "read_jsonl",
]


class TrackingConfig(Config):
    """What to record besides the JSONL file, which is always written."""

    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    trackio_project: str | None = None
    run_name: str | None = None  # None: the name of the output folder
    console: bool = True  # the progress bar


class Tracker(Protocol):
    """Something that records metrics and images by step."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the metrics of one step; NaN means "no value"."""
        ...

    def log_images(self, name: str, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Record images with one caption each."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


class JsonlTracker:
    """One JSON object a line: `step`, `time` (seconds since 1970) and the metrics; NaN and infinities become null.

    Images are no metrics: a run keeps them in its `evaluations/` folder already.

    Args:
        path: The file, such as `outputs/run/metrics.jsonl`.
        resume_step: The first step that will be logged now: later or equal rows of the killed run are dropped, and so
            is a half-written last line. None starts anew; an existing file moves to `<path>.old`.

    Raises:
        DataError: The file to resume is damaged before its last line.
        CheckpointError: The system refuses to write.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self.path = path
        make_folder(path.parent)
        try:
            if path.exists() and resume_step is None:
                os.replace(path, path.with_name(f"{path.name}.old"))
            elif path.exists():
                rows = [row for row in read_jsonl(path) if row["step"] < resume_step]
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            # Unbuffered: a row that did not fit on the disk must not come back at close.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append one row; it is out of the process when this returns."""
        reserved = {"step", "time"} & metrics.keys()
        if reserved:
            raise ValueError(f"metrics={sorted(reserved)}: the names step and time are taken; rename the metric")
        row: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        for name, value in metrics.items():
            row[name] = float(value) if math.isfinite(value) else None
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            reason = None if self._file.write(data) == len(data) else "the disk is full"
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise CheckpointError(f"cannot write {self.path}: {reason}; free some space, then resume the run")

    def log_images(self, name: str, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Leave them where they are."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `JsonlTracker`; a half-written last line (a kill, or a run in progress) is left out.

    Raises:
        DataError: The file is missing, or a line other than the last is no JSON object with an integer `step`.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected the metrics.jsonl of a run") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, line in filled:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number != filled[-1][0]:
            raise DataError(f"{path}, line {number}: {line[:60]!r} is no JSON object with a step; repair or remove it")
    return rows


class TensorBoardTracker:
    """Event files in `<directory>/tensorboard`, and the config of the run as a text.

    Args:
        directory: The folder of the run.
        run_config: Shown on the text page.
        resume_step: TensorBoard hides what a killed run logged at or after this step.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, directory: Path, *, run_config: Mapping[str, Any], resume_step: int | None) -> None:
        _optional("tensorboard", field="tracking.tensorboard=true")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step)
        block = json.dumps(dict(run_config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in block.split("\n")))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Add one scalar per metric that has a value."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def log_images(self, name: str, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Add the images as `<name>/00` and so on, and their captions as the text `<name>/captions`."""
        for index, image in enumerate(images):
            self._writer.add_image(f"{name}/{index:02d}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        lines = [f"{index:02d}. {caption}" for index, caption in enumerate(captions)]
        self._writer.add_text(f"{name}/captions", "  \n".join(lines), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """One wandb run; its id is kept in `<directory>/wandb_run_id.txt`, so that a resumed run goes on in the same one.

    The step is a metric of its own and the x axis of all others: wandb silently drops a row whose built-in step is
    behind its last one, which every resumed run would meet.

    Raises:
        ConfigError: wandb is not installed, or cannot start a run.
    """

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        mode: Literal["online", "offline", "disabled"],
        run_name: str,
        run_config: Mapping[str, Any],
        resume_step: int | None,
    ) -> None:
        wandb = _optional("wandb", field=f"tracking.wandb_project={project}")
        id_file = directory / "wandb_run_id.txt"
        known = id_file.read_text().strip() if resume_step is not None and id_file.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                mode=mode,
                config=dict(run_config),
                dir=str(directory),
                id=known,
                resume="allow" if known else None,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"tracking.wandb_project={project}: wandb did not start: {error}; run `wandb login`, or set "
                f"tracking.wandb_mode (now {mode}) to offline or disabled"
            ) from error
        self._image: Callable[..., Any] = wandb.Image
        write_atomically(id_file, f"{self._run.id}\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log one row."""
        self._run.log({**metrics, "step": step})

    def log_images(self, name: str, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Log the images as one panel."""
        panel = [self._image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self._run.log({name: panel, "step": step})

    def close(self) -> None:
        """Finish the run; waits for the upload."""
        self._run.finish()


class TrackioTracker:
    """One trackio run, found again by its name when the run is resumed.

    Raises:
        ConfigError: trackio is not installed.
    """

    def __init__(self, *, project: str, run_name: str, run_config: Mapping[str, Any], resume_step: int | None) -> None:
        self._trackio = _optional("trackio", field=f"tracking.trackio_project={project}")
        resume = "never" if resume_step is None else "allow"
        self._trackio.init(project=project, name=run_name, config=dict(run_config), resume=resume)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log one row."""
        self._trackio.log(dict(metrics), step=step)

    def log_images(self, name: str, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Log each image as `<name>/00` and so on."""
        pairs = enumerate(zip(images, captions, strict=True))
        panel = {f"{name}/{i:02d}": self._trackio.Image(image, caption=caption) for i, (image, caption) in pairs}
        self._trackio.log(panel, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


class TrackerGroup:
    """Passes everything on to each of its trackers; itself a `Tracker`. Leaving its `with` block closes it."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log to every tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def log_images(self, name: str, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Log to every tracker."""
        for tracker in self.trackers:
            tracker.log_images(name, images, captions, step=step)

    def close(self) -> None:
        """Close every tracker, even when one of them fails; then raise that failure."""
        with ExitStack() as stack:
            for tracker in reversed(self.trackers):
                stack.callback(tracker.close)

    def __enter__(self) -> "TrackerGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def build_trackers(
    config: TrackingConfig,
    directory: Path,
    *,
    run_name: str,
    run_config: Mapping[str, Any],
    resume_step: int | None,
) -> TrackerGroup:
    """Build the trackers of a run; call it on the main process only.

    Args:
        config: Which ones.
        directory: The folder of the run; the metrics go to `<directory>/metrics.jsonl`.
        run_name: Used unless the config names the run.
        run_config: The config of the run, as plain values, shown by the trackers that can.
        resume_step: The first step to be logged by a resumed run, None for a new one.

    Raises:
        ConfigError: A tracker is asked for whose package is not installed; nothing is left open.
    """
    name = config.run_name or run_name
    built: list[Tracker] = []
    with ExitStack() as on_failure:

        def add(tracker: Tracker) -> None:
            built.append(tracker)
            on_failure.callback(tracker.close)

        # The JSONL file last: a missing package must not touch the metrics of an earlier run.
        if config.tensorboard:
            add(TensorBoardTracker(directory, run_config=run_config, resume_step=resume_step))
        if config.wandb_project is not None:
            make_folder(directory)
            add(
                WandbTracker(
                    directory,
                    project=config.wandb_project,
                    mode=config.wandb_mode,
                    run_name=name,
                    run_config=run_config,
                    resume_step=resume_step,
                )
            )
        if config.trackio_project is not None:
            project = config.trackio_project
            add(TrackioTracker(project=project, run_name=name, run_config=run_config, resume_step=resume_step))
        add(JsonlTracker(directory / "metrics.jsonl", resume_step=resume_step))
        on_failure.pop_all()
    return TrackerGroup(built[::-1])


def _optional(package: Literal["tensorboard", "wandb", "trackio"], *, field: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{field} needs the package {package}, which is not installed ({error}); "
            f"install it with: pip install 'tiltflow[{package}]'"
        ) from error
