"""Evaluations of a run: before, in between and after, each once, watched for reward hacking."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tiltflow.algorithms import Snapshot
from tiltflow.commands.build import described
from tiltflow.commands.run_folder import warn
from tiltflow.commands.same_rewards import reward_classes, split_reward
from tiltflow.config import RunConfig
from tiltflow.errors import RewardOutage, TiltflowError
from tiltflow.evaluation import EvaluationResult, HackingWatch, evaluate, held_out
from tiltflow.rewards import GroupwiseRewardModel, RewardArguments, RewardEngine, reward_class
from tiltflow.runtime.files import remove
from tiltflow.runtime.tracking import TrackerGroup, read_jsonl
from tiltflow.training.trainer import Trainer
from tiltflow.types import Prompt

METRICS_FILE = "metrics.jsonl"


class Evaluator:
    """Evaluates snapshots of a run's policy on its evaluation prompts, each once per run."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        engine: RewardEngine,
        prompts: Sequence[Prompt],
        *,
        directory: Path,
    ):
        """Take what is measured, and with what.

        Args:
            config: The run.
            trainer: Whose policy is measured.
            engine: The evaluation rewards.
            prompts: The evaluation prompts.
            directory: Where results are kept.
        """
        self._trainer = trainer
        self._prompts = prompts
        self._run = config
        self._directory = directory
        self.trackers = TrackerGroup([])  # told the `eval/` metrics and pictures
        every = config.train.evaluate_every or config.train.epochs
        self._held_out = held_out(engine.rewards, trainer.engine.rewards)
        self._relative = [entry.name for entry in trainer.engine.rewards if entry.weight != 0 and _is_relative(entry)]
        self._watch = HackingWatch(
            self._held_out,
            evaluations=(config.train.epochs - 1) // every,
            patience=config.train.early_stop,
            relative=self._relative,
        )
        self._told_mute: set[str] = set()
        self.should_stop = False
        self._distributed = trainer.distributed
        self._engine = engine

    def forget(self, *, after: int) -> None:
        """Remove the results of epochs after this one: the weights of those epochs will be others."""
        with self._distributed.together():
            if self._distributed.is_main:
                for path in self._directory.glob("*.json"):
                    if EvaluationResult.load(path).settings.get("epoch", 0) > after:
                        remove(path)

    def recall(self, epoch: int) -> None:
        """Let the watch see the evaluations of a resumed run that came before `epoch`."""
        every = self._run.train.evaluate_every
        if every is not None and self._distributed.is_main:
            for earlier in range(every, epoch, every):
                known = self._stored(_name(earlier), earlier)
                if known is not None:
                    self._observe(known, earlier, quiet=True)

    def if_due(self, epoch: int, *, status: Callable[[str], None]) -> None:
        """Evaluate the weights of an epoch that `train.evaluate_every` names; the last one is evaluated as "after".

        Warns when it looks like reward hacking; `should_stop` says whether that has gone on for `train.early_stop`
        evaluations.
        """
        every = self._run.train.evaluate_every
        if every is None or not 0 < epoch < self._run.train.epochs or epoch % every != 0:
            return
        result = self.once(_name(epoch), "ema", epoch=epoch, status=status)
        if result is not None:
            self._observe(result, epoch, quiet=False)
        self.should_stop = self._distributed.gather(self._watch.should_stop)[0]

    def _observe(self, result: EvaluationResult, epoch: int, *, quiet: bool) -> None:
        if not self._held_out:
            return
        every = self._run.train.evaluate_every or epoch
        rows = read_jsonl(self._directory.parent / METRICS_FILE)
        if self._watch.seen == 0:
            # What the policy was before training is told by the evaluation "before" and by the rollouts of epoch 1.
            before, start = self._stored("before", 0), self._training([row for row in rows if row["step"] == 1])
            if before is not None and (start or self._relative):
                self._watch.observe(before, start)
        window = [row for row in rows if epoch - every < row["step"] <= epoch]
        signs = self._watch.observe(result, self._training(window))
        if quiet:
            return
        for sign in signs:
            warn(f"epoch {epoch}: {sign}; this looks like reward hacking")
        for name in [name for name in self._watch.mute if name not in self._told_mute]:
            self._told_mute.add(name)
            warn(f"epoch {epoch}: {_mute_message(name, result)}")

    def _training(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the means of the rewards that are trained on and tell a rise, turned so that more is better."""
        means = {name: mean for name, mean in training_rewards(rows).items() if name not in self._relative}
        entries = [entry for entry in self._trainer.engine.rewards if entry.weight != 0 and entry.name in means]
        return {
            entry.name if entry.weight > 0 else f"-{entry.name}": math.copysign(1, entry.weight) * means[entry.name]
            for entry in entries
        }

    def once(
        self, name: str, snapshot: Snapshot, *, epoch: int, status: Callable[[str], None]
    ) -> EvaluationResult | None:
        """Evaluate a snapshot, shared by all processes, unless its result for this epoch is already there.

        One in which a reward scored nothing, such as a judge that was away, is measured again.

        Returns:
            The result on the main process, None on the others.

        Raises:
            RewardOutage: A reward failed that must not, on all processes alike.
        """
        known: EvaluationResult | None = None
        with self._distributed.together():
            if self._distributed.is_main:
                known = self._stored(name, epoch)
                known = None if known is not None and known.without_score() else known
                if known is not None and not self._is_logged(epoch):
                    self._log(known, epoch)
        if self._distributed.gather(known is not None)[0]:
            return known
        result = self._measured(name, snapshot, status)
        with self._distributed.together():
            if self._distributed.is_main:
                result = replace(result, settings={**result.settings, **self._settings(epoch)})
                result.save(self._directory)
                self._log(result, epoch)
                for line in result.failure_lines():
                    warn(f"evaluation {name!r}: {line}")
        return result if self._distributed.is_main else None

    def _measured(self, name: str, snapshot: Snapshot, status: Callable[[str], None]) -> EvaluationResult:
        policy = self._trainer.policy
        try:
            with torch.no_grad(), policy.weights.using(snapshot):
                return evaluate(
                    policy,
                    self._engine,
                    self._prompts,
                    config=self._run.evaluation,
                    name=name,
                    distributed=self._distributed,
                    progress=lambda done, total: status(f"evaluation '{name}' {done}/{total}"),
                )
        except TiltflowError as error:  # every rank has one: its own, or that another rank failed
            raise RewardOutage(f"evaluation '{name}': {error}") from error

    def _log(self, result: EvaluationResult, epoch: int) -> None:
        values = {f"eval/{key}": estimate.value for key, estimate in result.summary.items()}
        self.trackers.log(values, step=epoch)
        pictures = dict(result.pictures)
        for row in result.rows:
            if row.image is not None and row.image not in pictures and (self._directory / row.image).is_file():
                pictures[row.image] = _picture(self._directory / row.image)
        shown = [(pictures[row.image], row.prompt) for row in result.rows if row.image in pictures]
        images, captions = [picture for picture, _ in shown], [prompt for _, prompt in shown]
        self.trackers.log_images(f"eval/{result.name}", images, captions, step=epoch)

    def _is_logged(self, epoch: int) -> bool:
        """Tell whether the metrics of this run hold an evaluation of an epoch: a kill may have come before its row."""
        rows = read_jsonl(self._directory.parent / METRICS_FILE)
        return any(row["step"] == epoch and any(key.startswith("eval/") for key in row) for row in rows)

    def _settings(self, epoch: int) -> dict[str, Any]:
        measured = described(self._run.policy, self._run.data.eval_prompts, self._engine.rewards)
        return {**self._run.evaluation.model_dump(mode="json"), **measured, "epoch": epoch}

    def _stored(self, name: str, epoch: int) -> EvaluationResult | None:
        path = self._directory / f"{name}.json"
        if not path.exists():
            return None
        found = EvaluationResult.load(path)
        wanted, settings = self._comparable(self._settings(epoch)), self._comparable(found.settings)
        return found if wanted.items() <= settings.items() else None

    def _comparable(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a result without how its rewards were run."""
        classes = reward_classes(self._engine.rewards)
        return {**settings, "rewards": [split_reward(entry, classes)[0] for entry in settings.get("rewards", [])]}


def training_rewards(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each training reward over some rows of the metrics."""
    prefix, suffix = "reward/", "/mean"
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and key.endswith(suffix) and value is not None:
                found.setdefault(key[len(prefix) : -len(suffix)], []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _is_relative(entry: RewardArguments) -> bool:
    """Tell whether a reward compares the images of a prompt with each other, so that its mean cannot tell a rise."""
    return issubclass(reward_class(entry.reward_model), GroupwiseRewardModel)


def _mute_message(name: str, result: EvaluationResult) -> str:
    causes = [row.info.get(name, {}).get("failure") for row in result.rows]
    cause = next((str(cause) for cause in causes if cause), "fewer than two evaluation prompts")
    return f"held-out reward {name!r} has no values to compare ({cause}), so it cannot tell reward hacking; mend it"


def _name(epoch: int) -> str:
    return f"epoch_{epoch:06d}"


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")
