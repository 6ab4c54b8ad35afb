"""The best few of a run's models, by a metric of its validations, each ready to be used."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.reward_training.fit_config import KeepBestConfig, validation_prefixes
from tiltflow.runtime.files import replacing_folder
from tiltflow.runtime.plain import plain

METRICS_FILE = "metrics.json"  # beside the weights: {"step": 200, "metrics": {...}}


@dataclass(frozen=True)
class BestModel:
    """One model that was kept."""

    folder: Path
    step: int
    metrics: Mapping[str, float | None]


class BestModels:
    """Keeps the best models of a run in `<directory>/step_000200` and so on; the main process alone may use it.

    Args:
        directory: The folder of the models; made when the first is kept.
        config: Which metric decides, and how many are kept.
        sets: Names of the validation sets.
        names: The metrics that each of them measures; empty where that is not known before.

    Raises:
        ConfigError: The metric cannot be one of these sets, or is not among these names.
    """

    def __init__(
        self, directory: Path, config: KeepBestConfig, *, sets: Iterable[str], names: Iterable[str] = ()
    ) -> None:
        prefixes = validation_prefixes(sets).values()
        if not config.metric.startswith(tuple(f"{prefix}/" for prefix in prefixes)):
            legal = ", ".join(f"{prefix}/loss" for prefix in prefixes)
            raise ConfigError(
                f"train.keep_best.metric={config.metric!r} is no metric of a validation set; "
                + (f"such are: {legal}" if legal else "there is none: give the data a validation set")
            )
        self.directory = directory
        self.config = config
        known = list(names)
        if known:
            self.check([f"{prefix}/{name}" for prefix in prefixes for name in known])

    def check(self, metrics: Iterable[str]) -> None:
        """Check that a validation measures the metric.

        Raises:
            ConfigError: It does not; lists what there is.
        """
        names = [name for name in metrics if name.startswith("validation") and "/" in name]
        if self.config.metric not in names:
            raise ConfigError(
                f"train.keep_best.metric={self.config.metric!r} is not measured; legal: {', '.join(sorted(names))}"
            )

    def wants(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Tell whether the model of a step is among the best; a metric without a value never is."""
        value = metrics[self.config.metric]
        if not math.isfinite(value):
            return False
        others = [model for model in self.models() if model.step != step]
        return len(others) < self.config.count or self._rank(step, value) < self._rank_of(others[-1])

    def add(self, step: int, metrics: Mapping[str, float], write: Callable[[Path], object]) -> None:
        """Keep the model of a step, and remove those that are no longer among the best.

        Args:
            step: Of the model.
            metrics: Of its validation.
            write: Fills the empty folder that it is given.
        """
        write_model(self.directory / f"step_{step:06d}", step, metrics, write)
        for model in self.models()[self.config.count :]:
            shutil.rmtree(model.folder)

    def forget(self, *, after: int) -> None:
        """Remove the models of later steps: those of a continuation that was given up."""
        for model in self.models():
            if model.step > after:
                shutil.rmtree(model.folder)

    def models(self) -> list[BestModel]:
        """Return what is kept, the best first."""
        return sorted(kept_models(self.directory), key=self._rank_of)

    def _rank_of(self, model: BestModel) -> tuple[float, int]:
        value = model.metrics.get(self.config.metric)
        return self._rank(model.step, value) if value is not None else (math.inf, model.step)

    def _rank(self, step: int, value: float) -> tuple[float, int]:
        """Return what is smaller for a better model; of equals the earlier one is better."""
        return (value if self.config.mode == "min" else -value, step)


def kept_models(directory: Path) -> list[BestModel]:
    """Return the models in a folder, by step.

    Raises:
        CheckpointError: The metrics of one cannot be read.
    """
    models = [model for path in sorted(directory.glob("step_*")) if (model := read_model(path)) is not None]
    return sorted(models, key=lambda model: model.step)


def read_model(folder: Path) -> BestModel | None:
    """Return what `write_model` wrote about a model; None where there is no such folder.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return BestModel(folder, int(content["step"]), dict(content["metrics"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove the folder, or restore it") from error


def set_aside(folder: Path) -> None:
    """Make room for a new run: a folder of an earlier one moves to `<folder>.old`, where it replaces another."""
    former = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)


def write_model(folder: Path, step: int, metrics: Mapping[str, float], write: Callable[[Path], object]) -> None:
    """Write a finished model and what it measured, whole or not at all.

    Args:
        folder: Replaced where it exists.
        step: Of the model.
        metrics: Of its validation; may be empty.
        write: Fills the empty folder that it is given.
    """
    with replacing_folder(folder) as temporary:
        write(temporary)
        content = {"step": step, "metrics": plain(dict(metrics))}
        (temporary / METRICS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
