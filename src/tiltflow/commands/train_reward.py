"""`tiltflow train-reward`: a reward model from its config to its report, continued where it was interrupted."""

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tiltflow.commands.build import CONFIG_FILE
from tiltflow.commands.reward_config import load_reward_config
from tiltflow.commands.reward_results import FOLDER as EVALUATION_FOLDER
from tiltflow.commands.run_folder import changed_keys, newest_checkpoint, start_trackers, warn
from tiltflow.report.reward_page import DATA_FILE, write_reward_report
from tiltflow.reward_training.base import Fitting
from tiltflow.reward_training.best import BestModels, read_model, set_aside, write_model
from tiltflow.reward_training.fit_config import FitRunConfig, RewardModelKind
from tiltflow.reward_training.shown import COUNT, FOLDER, pictures, write_shown
from tiltflow.reward_training.trainer import FitStep, RewardTrainer
from tiltflow.runtime.checkpoint import CheckpointStore, write_atomically
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.files import put_back
from tiltflow.runtime.tracking import ProgressBar, TrackerGroup

# Where one of these changes, a model's numbers do not compare with those before.
MEASURED_BY = ("data.validation", "train.limit_validation_batches")
# A run in which one of these changes is another run; each kind of reward model adds its own, and excepts some of them.
IDENTITY = ("seed", "train.batch_size", "train.shuffle", "train.length_window")


def run_reward_training(source: str, overrides: Sequence[tuple[str, str]]) -> Path:
    """Train a reward model; continues from `<output_dir>/latest` when it exists.

    Args:
        source: Path of a config, or the name of a packaged one.
        overrides: (key, value) pairs over it.

    Returns:
        The run's folder, with checkpoints, metrics, the best models, `model/` and `report.html` in it.

    Raises:
        TiltflowError: Anything in the config, the data or the checkpoints is wrong.
    """
    kind, config = load_reward_config(source, overrides)
    distributed = Distributed()
    try:
        _train(kind, config, distributed)  # its model is gone when the group is left
    finally:
        distributed.close()
    return Path(str(config.output_dir))


def _train(kind: RewardModelKind, config: FitRunConfig, distributed: Distributed) -> None:
    with distributed.together():
        fitting = kind.build(config)
    with distributed.together():
        trainer = RewardTrainer(fitting, config.train, seed=config.seed, distributed=distributed)
    _RewardRun(trainer, fitting, config, kind, distributed).to_the_end()


class _RewardRun:
    """One start of a run: the trainer, the folder, and what is written into it when."""

    def __init__(
        self,
        trainer: RewardTrainer,
        fitting: Fitting,
        config: FitRunConfig,
        kind: RewardModelKind,
        distributed: Distributed,
    ) -> None:
        self.trainer = trainer
        self.fitting = fitting
        self.config = config
        self.kind = kind
        self.distributed = distributed
        self.folder = Path(str(config.output_dir))
        self.store = CheckpointStore(self.folder, keep=config.train.keep, unit="step")
        best, names = config.train.keep_best, fitting.model.metric_names
        folder = self.folder / "best"
        self.best = None if best is None else BestModels(folder, best, sets=fitting.validation, names=names)

    def to_the_end(self) -> None:
        """Resume, train, and leave the finished model."""
        trainer, config = self.trainer, self.config
        resumed = self._resume()
        last: FitStep | None = None
        enabled = self.distributed.is_main and config.tracking.console
        with start_trackers(config, self.folder, trainer.step if resumed else None, self.distributed) as trackers:
            self._describe_data()
            with ProgressBar(
                trainer.total_steps,
                start=trainer.step,
                title=self.folder.name,
                unit="step",
                line_every=max(1, trainer.total_steps // 100),
                enabled=enabled,
            ) as bar:
                for step in trainer.run(status=bar.status):
                    self._after_step(step, trackers, bar)
                    last = step
        self._finish(last)

    def _resume(self) -> bool:
        """Load the newest intact checkpoint, if there is one, and tell whether there was."""
        checkpoint = newest_checkpoint(self.store, self.distributed)
        changed = list[str]()
        if checkpoint is not None:
            identity = (*IDENTITY, *self.kind.identity)
            changed = changed_keys(self.folder / CONFIG_FILE, self.config, identity, free=self.kind.free)
            self.trainer.load(checkpoint)
        with self.distributed.together():
            if self.distributed.is_main:
                self._make_room(changed, afresh=checkpoint is None)
        if checkpoint is not None and self.distributed.is_main:
            for line in changed:
                warn(f"{self.folder} goes on with another value: {line}")
            print(f"resuming {self.folder} after step {self.trainer.step}", file=sys.stderr)
        return checkpoint is not None

    def _write_data(self) -> None:
        """Write for the report how much data there is and what has been left out so far."""
        content = {
            "total_steps": self.trainer.total_steps,
            "train": len(self.fitting.train),
            "validation": self._validation_sizes(),
            "left_out": self.fitting.left_out(),
        }
        write_atomically(self.folder / DATA_FILE, json.dumps(content, indent=1))

    def _validation_sizes(self) -> dict[str, int]:
        return {name or "validation": len(examples) for name, examples in self.fitting.validation.items()}

    def _make_room(self, changed: Sequence[str], *, afresh: bool) -> None:
        """Move away, or remove, models of steps that this start will train, perhaps to other weights.

        The best models also move away where those to come are measured on something else.
        """
        final, best = self.folder / "model", self.folder / "best"
        put_back(final)  # before it is looked for: a kill may have left it under another name
        goes_on = self.trainer.step < self.trainer.total_steps
        if afresh:
            for former in (best, self.folder / FOLDER, self.folder / EVALUATION_FOLDER):
                set_aside(former)
        elif goes_on and any(line.startswith(MEASURED_BY) for line in changed):
            set_aside(best)
        elif changed and self.best is not None:
            self.best.forget(after=self.trainer.step)
        there = None if afresh else read_model(final)
        if there is None or there.step > self.trainer.step:
            set_aside(final)

    def _describe_data(self) -> None:
        """Tell how much data there is and what was left out, on the console and for the report."""
        if not self.distributed.is_main:
            return
        self._write_data()
        trainer = self.trainer
        sizes = self._validation_sizes().items()
        told = [f"{len(self.fitting.train)} training examples", *(f"{count} of {name}" for name, count in sizes)]
        told += [f"{why}: {count}" for why, count in self.fitting.notes.items() if count]
        steps = f"{trainer.batches.steps_per_epoch} steps an epoch, {trainer.total_steps} in all"
        print(f"{'; '.join(told)}; {steps}", file=sys.stderr)
        for remark in self.fitting.remarks:
            warn(remark)

    def _after_step(self, step: FitStep, trackers: TrackerGroup, bar: ProgressBar) -> None:
        """Keep the model if it is among the best, log, and save when due."""
        train = self.config.train
        best = self.best if step.validated else None
        unknown = best is not None and best.config.metric not in step.metrics
        if best is not None and not unknown:
            self._keep_if_best(step, best)
        trackers.log(step.metrics, step=step.number)
        if step.validated:
            self._show(step, trackers)
        due = step.last or unknown or (train.save_every is not None and step.number % train.save_every == 0)
        if step.number > 0 and due:
            state = self.trainer.state()
            with self.distributed.together():
                if self.distributed.is_main:
                    self.store.save(step.number, partial(self.trainer.save, state=state))
                    self._write_data()  # what has been found since; every process's, because of `state`
        if best is not None and unknown:
            best.check(step.metrics)  # only now: what has been trained is not lost
        if self.distributed.is_main and (due or step.validated):
            write_reward_report(self.folder)
        if step.number > 0:
            rate = train.batch_size / step.metrics["step_seconds"]
            bar.advance(loss=step.metrics["train/loss"], rate=rate)

    def _show(self, step: FitStep, trackers: TrackerGroup) -> None:
        """Make a few validation examples visible, in the report and in the trackers, where there is anything to see."""
        examples = self.trainer.shown(COUNT)
        with self.distributed.together():
            if examples:
                write_shown(self.folder, examples)
            for name, shown in examples.items():
                images = [image for each in shown for image in pictures(each)]
                captions = [f"{each.caption} | {note}" for each in shown for note in each.notes]
                trackers.log_images(f"examples/{name}", images, captions, step=step.number)

    def _keep_if_best(self, step: FitStep, best: BestModels) -> None:
        main = self.distributed.is_main
        with self.distributed.together():
            wanted = best.wants(step.number, step.metrics) if main else False
        if not self.distributed.gather(wanted)[0]:
            return
        model = self.trainer.whole_model()
        with self.distributed.together():
            if main:
                best.add(step.number, step.metrics, model.save_pretrained)

    def _finish(self, last: FitStep | None) -> None:
        """Leave the best model, or the last one, in `model/`, and write the report."""
        main, final = self.distributed.is_main, self.folder / "model"
        with self.distributed.together():
            chosen = next(iter(self.best.models()), None) if main and self.best is not None else None
            if main and self.best is not None and chosen is None:
                warn(f"{self.best.config.metric} never had a value: model/ is the last model, not the best")
            number = chosen.step if chosen is not None else self.trainer.step
            there = read_model(final) if main else None
            missing = there is None or there.step != number or last is not None
        chosen_folder, missing = self.distributed.gather((chosen and chosen.folder, missing))[0]
        if missing:
            model = self.trainer.whole_model() if chosen_folder is None else None
            with self.distributed.together():
                if main and chosen is not None:
                    copy = partial(shutil.copytree, chosen.folder, dirs_exist_ok=True)
                    write_model(final, chosen.step, {k: v for k, v in chosen.metrics.items() if v is not None}, copy)
                elif main and model is not None:
                    write_model(final, self.trainer.step, last.metrics if last else {}, model.save_pretrained)
        with self.distributed.together():
            if main:
                print(f"model: {final}\nreport: {write_reward_report(self.folder)}")
