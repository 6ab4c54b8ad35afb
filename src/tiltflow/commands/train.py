"""`tiltflow train`: a run from its config to its report, continued where it was interrupted."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tiltflow.algorithms import Snapshot
from tiltflow.commands.build import CONFIG_FILE, build_trainer, described
from tiltflow.config import RunConfig, dump, load_run_config, read_yaml
from tiltflow.data import load_prompts
from tiltflow.errors import ConfigError
from tiltflow.evaluation import EvaluationResult, evaluate
from tiltflow.report import write_report
from tiltflow.rewards import RewardEngine, build_reward_model, check_prompts
from tiltflow.runtime.checkpoint import CheckpointStore, write_atomically
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.files import make_folder
from tiltflow.runtime.tracking import ProgressBar, TrackerGroup, build_trackers
from tiltflow.training.trainer import Epoch, Trainer
from tiltflow.types import Prompt

# A run whose config changes in one of these is another run.
IDENTITY = (
    "seed",
    "policy.model_name",
    "policy.finetune",
    "policy.lora",
    "train.trainer_type",
    "rewards",
    "data.prompts",
)


def run_training(source: str, overrides: Sequence[tuple[str, str]]) -> Path:
    """Post-train a policy; continues from `<output_dir>/latest` when it exists.

    Args:
        source: Path of a config, or the name of a packaged one.
        overrides: (key, value) pairs over it.

    Returns:
        The run's folder, with checkpoints, metrics, evaluations and `report.html` in it.

    Raises:
        TiltflowError: Anything in the config, the prompts, the rewards or the checkpoints is wrong.
    """
    config = load_run_config(source, overrides)
    distributed = Distributed()
    run_dir = Path(str(config.output_dir))
    try:
        eval_prompts = load_prompts(config.data.eval_prompts, split="test", blocklist=config.data.blocklist)
        check_prompts(config.eval_rewards or config.rewards, eval_prompts, source=config.data.eval_prompts)
        trainer = build_trainer(config, distributed)
        _run(trainer, config, run_dir, eval_prompts, distributed)
    finally:
        distributed.close()
    return run_dir


def _run(
    trainer: Trainer, config: RunConfig, run_dir: Path, eval_prompts: Sequence[Prompt], distributed: Distributed
) -> None:
    store = CheckpointStore(run_dir, keep=config.checkpoint.keep)
    resumed = _resume(trainer, config, store, distributed)
    evaluator = Evaluator(config, trainer, eval_prompts, directory=run_dir / "evaluations")
    with _trackers(config, run_dir, trainer.epoch if resumed else None, distributed) as trackers:
        evaluator.report_to(trackers, first_step=trainer.epoch + 1 if resumed else 0)
        enabled = distributed.is_main and config.tracking.console
        with ProgressBar(config.train.epochs, start=trainer.epoch, title=run_dir.name, enabled=enabled) as bar:
            evaluator.once("before", "ref", epoch=0, status=bar.status)
            _evaluate_if_due(evaluator, config, trainer.epoch, bar)  # a kill may have come between save and evaluation
            bar.begin()
            for epoch in trainer.run(status=bar.status):
                _after_epoch(epoch, trainer, config, store, trackers, bar)
                _evaluate_if_due(evaluator, config, epoch.number, bar)
            evaluator.once("after", "ema", epoch=trainer.epoch, status=bar.status)
    with distributed.together():
        if distributed.is_main:
            print(f"report: {write_report(run_dir)}")


@contextmanager
def _trackers(
    config: RunConfig, run_dir: Path, resumed_after: int | None, distributed: Distributed
) -> Iterator[TrackerGroup]:
    """Write the config into the run's folder and start its trackers on the main process; the others have none."""
    trackers = TrackerGroup([])
    with distributed.together():
        if distributed.is_main:
            make_folder(run_dir)
            trackers = build_trackers(
                config.tracking,
                run_dir,
                run_name=run_dir.name,
                run_config=config.model_dump(mode="json"),
                resume_step=None if resumed_after is None else resumed_after + 1,
            )
            write_atomically(run_dir / CONFIG_FILE, dump(config))
    with trackers:
        yield trackers


def _evaluate_if_due(evaluator: "Evaluator", config: RunConfig, epoch: int, bar: ProgressBar) -> None:
    """Evaluate the weights of an epoch that `train.evaluate_every` names; the last one is evaluated as "after"."""
    every = config.train.evaluate_every
    if every is not None and 0 < epoch < config.train.epochs and epoch % every == 0:
        evaluator.once(f"epoch_{epoch:06d}", "ema", epoch=epoch, status=bar.status)


def _resume(trainer: Trainer, config: RunConfig, store: CheckpointStore, distributed: Distributed) -> bool:
    """Load the newest intact checkpoint on all ranks, if there is one; the main process chooses it."""
    chosen: Path | None = None
    with distributed.together():
        if distributed.is_main and store.directory.exists():
            chosen = store.latest(on_skip=_warn)
    checkpoint = distributed.gather(chosen)[0]
    if checkpoint is None:
        return False
    changed = changed_keys(store.directory / CONFIG_FILE, config)
    trainer.load(checkpoint)
    if distributed.is_main:
        for line in changed:
            _warn(f"{store.directory} goes on with another value: {line}")
        print(f"resuming {store.directory} after epoch {trainer.epoch}", file=sys.stderr)
    return True


def changed_keys(path: Path, config: RunConfig) -> list[str]:
    """Compare a run's saved config with the one it is resumed with.

    Returns:
        One line per key that has changed.

    Raises:
        ConfigError: A key has changed that makes it another run.
    """
    if not path.is_file():
        return []
    before, now = _flatten(read_yaml(path)), _flatten(config.model_dump(mode="json"))
    lines = []
    for key in sorted({*before, *now} - {"output_dir"}):
        if before.get(key) == now.get(key):
            continue
        line = f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        if key.startswith(IDENTITY):
            raise ConfigError(f"{path.parent} holds another run ({line}); choose another output_dir, or keep the value")
        lines.append(line)
    return lines


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _after_epoch(
    epoch: Epoch,
    trainer: Trainer,
    config: RunConfig,
    store: CheckpointStore,
    trackers: TrackerGroup,
    bar: ProgressBar,
) -> None:
    """Log, save when due, and move the progress bar."""
    metrics, distributed = epoch.metrics, trainer.distributed
    last = epoch.number == config.train.epochs
    with distributed.together():
        trackers.log(metrics, step=epoch.number)
        if distributed.is_main and (last or epoch.number % config.train.save_every == 0):
            store.save(epoch.number, trainer.save)
            write_report(store.directory)
    generated = config.train.num_prompts_per_epoch * config.train.group_size
    bar.advance(reward=metrics[f"reward/{trainer.engine.names[0]}/mean"], rate=generated / metrics["seconds/epoch"])


class Evaluator:
    """Evaluates snapshots of a run's policy on its evaluation prompts, each once per run."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        *,
        directory: Path,
    ):
        """Build the evaluation rewards.

        Args:
            config: The run.
            trainer: Whose policy is measured; its rewards serve unless the config has `eval_rewards`.
            prompts: The evaluation prompts.
            directory: Where results are kept.
        """
        self._trainer = trainer
        self._prompts = prompts
        self._run = config
        self._directory = directory
        self._trackers = TrackerGroup([])
        self._first_step = 0
        self._distributed = trainer.distributed
        self._engine = trainer.engine
        if config.eval_rewards:
            accelerator = trainer.distributed.accelerator
            self._engine = RewardEngine(
                config.eval_rewards, factory=lambda reward: build_reward_model(reward, accelerator)
            )

    def report_to(self, trackers: TrackerGroup, *, first_step: int) -> None:
        """Tell trackers the `eval/` metrics and pictures.

        Args:
            trackers: Those of this process.
            first_step: What they knew of this step and later ones they have forgotten, so that results which are
                already there are told again.
        """
        self._trackers = trackers
        self._first_step = first_step

    def once(self, name: str, snapshot: Snapshot, *, epoch: int, status: Callable[[str], None]) -> None:
        """Evaluate a snapshot, shared by all processes, unless its result for this epoch is already there."""
        known: EvaluationResult | None = None
        with self._distributed.together():
            if self._distributed.is_main:
                known = self._known(name, epoch)
                if known is not None and epoch >= self._first_step:
                    self._log(known, epoch)
        if self._distributed.gather(known is not None)[0]:
            return
        policy = self._trainer.policy
        with torch.no_grad(), policy.weights.using(snapshot):
            result = evaluate(
                policy,
                self._engine,
                self._prompts,
                config=self._run.evaluation,
                name=name,
                distributed=self._distributed,
                progress=lambda done, total: status(f"evaluation '{name}' {done}/{total}"),
            )
        with self._distributed.together():
            if self._distributed.is_main:
                result = replace(result, settings={**result.settings, **self._settings(epoch)})
                result.save(self._directory)
                self._log(result, epoch)

    def _log(self, result: EvaluationResult, epoch: int) -> None:
        values = {f"eval/{key}": estimate.value for key, estimate in result.summary.items()}
        self._trackers.log(values, step=epoch)
        kept = [(row.image, row.prompt) for row in result.rows if row.image is not None]
        images = [result.pictures.get(place) or _picture(self._directory / place) for place, _ in kept]
        self._trackers.log_images(f"eval/{result.name}", images, [prompt for _, prompt in kept], step=epoch)

    def _settings(self, epoch: int) -> dict[str, Any]:
        measured = described(self._run.policy, self._run.data.eval_prompts, self._engine.rewards)
        return {**self._run.evaluation.model_dump(mode="json"), **measured, "epoch": epoch}

    def _known(self, name: str, epoch: int) -> EvaluationResult | None:
        path = self._directory / f"{name}.json"
        if not path.exists():
            return None
        found = EvaluationResult.load(path)
        return found if self._settings(epoch).items() <= found.settings.items() else None


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
