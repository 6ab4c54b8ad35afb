"""Which models a run keeps."""

import math
from pathlib import Path

import pytest

from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.reward_training.best import BestModels, read_model, set_aside, write_model
from tiltflow.reward_training.fit_config import KeepBestConfig


def best(folder: Path, *, metric: str = "validation/acc", mode: str = "max", count: int = 2) -> BestModels:
    config = KeepBestConfig.model_validate({"metric": metric, "mode": mode, "count": count})
    return BestModels(folder / "best", config, sets=["all"])


def fill(folder: Path) -> None:
    (folder / "weights").write_text("w")


def consider(models: BestModels, values: dict[int, float]) -> list[int]:
    """Offer a model per step, and return the steps of those that were kept, the best first."""
    for step, value in values.items():
        metrics = {models.config.metric: value, "train/loss": 1.0}
        if models.wants(step, metrics):
            models.add(step, metrics, fill)
    return [model.step for model in models.models()]


def test_the_best_few_stay_and_of_equals_the_earlier(tmp_path: Path) -> None:
    models = best(tmp_path)
    assert consider(models, {10: 0.5, 20: 0.7, 30: 0.7, 40: 0.6, 50: math.nan}) == [20, 30]
    assert sorted(path.name for path in models.directory.iterdir()) == ["step_000020", "step_000030"]
    assert consider(models, {60: 0.8}) == [60, 20]
    assert (models.directory / "step_000060" / "weights").read_text() == "w"
    assert consider(best(tmp_path / "down", mode="min", count=1), {1: 3.0, 2: 1.0, 3: 2.0}) == [2]


def test_a_step_that_comes_again_takes_its_own_place(tmp_path: Path) -> None:
    models = best(tmp_path)
    consider(models, {10: 0.5, 20: 0.7})
    assert consider(models, {20: 0.4}) == [10, 20]
    models.forget(after=10)
    assert [model.step for model in models.models()] == [10]
    set_aside(models.directory)
    assert models.models() == [] and (tmp_path / "best.old" / "step_000010" / "weights").is_file()
    consider(models, {30: 0.5})
    set_aside(models.directory), set_aside(models.directory)
    assert [path.name for path in (tmp_path / "best.old").iterdir()] == ["step_000030"]


def test_unknown_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric='acc' is no metric of a validation set; such are: validation/loss"):
        best(tmp_path, metric="acc")
    config = KeepBestConfig(metric="validation/acc")
    with pytest.raises(ConfigError, match=r"such are: validation_a/loss, validation_b/loss"):
        BestModels(tmp_path, config, sets=["a", "b"])
    with pytest.raises(ConfigError, match="there is none: give the data a validation set"):
        BestModels(tmp_path, config, sets=[])
    with pytest.raises(ConfigError, match=r"'validation/acc' is not measured; legal: validation/loss, validation/mae"):
        best(tmp_path).check(["validation/loss", "validation/mae", "validation_seconds", "train/acc"])


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    write_model(tmp_path / "model", 3, {"validation/loss": math.nan}, fill)
    with pytest.raises(CheckpointError, match="No space left"):
        write_model(tmp_path / "model", 4, {}, fail)
    model = read_model(tmp_path / "model")
    assert model is not None and (model.step, model.metrics) == (3, {"validation/loss": None})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model" / "metrics.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"metrics\.json cannot be read"):
        read_model(tmp_path / "model")
    assert read_model(tmp_path / "nothing") is None
