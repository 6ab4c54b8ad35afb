"""`tiltflow train`: a run from its config to its report, continued where it was interrupted."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tiltflow.commands.build import CONFIG_FILE, build_engines, build_trainer
from tiltflow.commands.evaluator import Evaluator
from tiltflow.commands.run_folder import changed_keys, newest_checkpoint, start_trackers, warn
from tiltflow.commands.same_rewards import Classes, reward_classes, split_reward, without_secrets
from tiltflow.config import REWARD_KEYS, RunConfig, load_run_config, normalise_rewards
from tiltflow.data import load_prompts
from tiltflow.errors import RewardOutage
from tiltflow.report import write_report
from tiltflow.rewards import check_prompts
from tiltflow.runtime.checkpoint import CheckpointStore
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.tracking import ProgressBar, TrackerGroup
from tiltflow.training.trainer import Epoch, Trainer

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
        with distributed.together():
            eval_prompts = load_prompts(config.data.eval_prompts, split="test", blocklist=config.data.blocklist)
            check_prompts(config.eval_rewards or config.rewards, eval_prompts, source=config.data.eval_prompts)
        engine, eval_engine = build_engines(config, distributed)
        trainer = build_trainer(config, distributed, engine)
        evaluator = Evaluator(config, trainer, eval_engine, eval_prompts, directory=run_dir / "evaluations")
        _run(trainer, evaluator, config, run_dir, distributed)
    finally:
        distributed.close()
    return run_dir


def _run(trainer: Trainer, evaluator: Evaluator, config: RunConfig, run_dir: Path, distributed: Distributed) -> None:
    store = CheckpointStore(run_dir, keep=config.checkpoint.keep)
    resumed, changed = _resume(trainer, config, store, distributed)
    with start_trackers(config, run_dir, trainer.epoch if resumed else None, distributed) as trackers:
        evaluator.trackers = trackers
        if changed or not resumed:
            evaluator.forget(after=trainer.epoch)
        enabled = distributed.is_main and config.tracking.console
        with (
            ProgressBar(config.train.epochs, start=trainer.epoch, title=run_dir.name, enabled=enabled) as bar,
            _saved_if_rewards_fail(trainer, config, store),
        ):
            evaluator.once("before", "ref", epoch=0, status=bar.status)
            evaluator.recall(trainer.epoch)
            evaluator.if_due(trainer.epoch, status=bar.status)  # a kill may have come between save and evaluation
            bar.begin()
            while trainer.epoch < config.train.epochs and not evaluator.should_stop:
                epoch = trainer.run_epoch(trainer.epoch + 1, status=bar.status)
                _after_epoch(epoch, trainer, config, store, trackers, bar)
                evaluator.if_due(epoch.number, status=bar.status)
            _save_if_stopped(trainer, config, store)
            evaluator.once("after", "ema", epoch=trainer.epoch, status=bar.status)
    with distributed.together():
        if distributed.is_main:
            print(f"report: {write_report(run_dir)}")


@contextmanager
def _saved_if_rewards_fail(trainer: Trainer, config: RunConfig, store: CheckpointStore) -> Iterator[None]:
    """When rewards fail in an epoch or an evaluation, save what was learnt before.

    Raises:
        RewardOutage: They failed; says what is kept.
    """
    try:
        yield
    except RewardOutage as error:
        _save_if_stopped(trainer, config, store)
        kept = f"the weights after epoch {trainer.epoch} are saved in {store.directory}" if trainer.epoch else ""
        raise RewardOutage(f"{error}; {kept or 'no epoch was finished before'}") from error


def _save_if_stopped(trainer: Trainer, config: RunConfig, store: CheckpointStore) -> None:
    """Save a run that was stopped at an epoch without a checkpoint."""
    with trainer.distributed.together():
        stopped = trainer.epoch < config.train.epochs and trainer.epoch % config.train.save_every != 0
        if trainer.distributed.is_main and stopped and not store.has(trainer.epoch):
            store.save(trainer.epoch, trainer.save)


def _resume(trainer: Trainer, config: RunConfig, store: CheckpointStore, distributed: Distributed) -> tuple[bool, bool]:
    """Load the newest intact checkpoint on all ranks, if there is one; the main process chooses it.

    Returns:
        Whether there was one, and whether its run had another config.
    """
    checkpoint = newest_checkpoint(store, distributed)
    if checkpoint is None:
        return False, False
    changed = changed_values(store.directory / CONFIG_FILE, config)
    trainer.load(checkpoint)
    if distributed.is_main:
        for line in changed:
            warn(f"{store.directory} goes on with another value: {line}")
        print(f"resuming {store.directory} after epoch {trainer.epoch}", file=sys.stderr)
    return True, bool(changed)


def changed_values(path: Path, config: RunConfig) -> list[str]:
    """Compare a run's saved config with the one it is resumed with, as `changed_keys` does.

    Another secret makes no other run, nor does another way of running the same reward.
    """
    classes = reward_classes((*config.rewards, *config.eval_rewards))
    return changed_keys(path, config, IDENTITY, compared=partial(_comparable, classes=classes))


def _comparable(values: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    """Return a config's values without the secrets of its rewards, and apart from them how training runs its rewards.

    Args:
        values: Of a saved config.
        classes: Those of the rewards.
    """
    rewards, measured = (normalise_rewards(values.get(key) or [], key=key) for key in REWARD_KEYS)
    parts = [split_reward(entry, classes) for entry in rewards]
    return {
        **values,
        "rewards": [what for what, _ in parts],
        **{f"reward {what['name']!r}": how for what, how in parts},
        "eval_rewards": [without_secrets(entry, classes) for entry in measured],
    }


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
