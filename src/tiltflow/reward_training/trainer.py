"""The loop that fits a reward model: exact means over micro-batches, processes and batches that are not full."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.errors import CheckpointError, ConfigError, TrainingError
from tiltflow.reward_training.base import Batch, Examples, Fitting, Shown, Totals, TrainableRewardModel
from tiltflow.reward_training.batches import Batches
from tiltflow.reward_training.fit_config import FitConfig, check_schedule, learning_rate, validation_prefixes
from tiltflow.reward_training.loader import LoadedStep, load_steps, to_device
from tiltflow.runtime.checkpoint import load_state, load_tensors, save_state, save_tensors
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.parallel import ParallelModel
from tiltflow.runtime.randomness import derive_seed

WEIGHTS_FILE = "weights.safetensors"
SORTED = 1_000_000  # batches of a window in which a whole validation set is put in order of length

Status = Callable[[str], None]


@dataclass(frozen=True)
class FitStep:
    """What one step leaves behind for whoever watches, the same on every process.

    `metrics` are those of the step (`train/loss`, `lr` ...) and, where it was validated, `validation/loss` and so on.
    """

    number: int  # counted from 1; 0 is the validation before the first
    metrics: Mapping[str, float]
    validated: bool
    last: bool  # of this start: the end of the run, or of its time


class RewardTrainer:
    """Fits one reward model to its data.

    Args:
        fitting: The model, on the CPU and the same on every process, and the data.
        config: How to train.
        seed: Seeds the order of the data and what is random in the model.
        distributed: The processes.

    Raises:
        ConfigError: The sizes do not fit, or the model lacks what the config asks for.
    """

    def __init__(self, fitting: Fitting, config: FitConfig, *, seed: int, distributed: Distributed) -> None:
        self.model: TrainableRewardModel = fitting.model
        self.config = config
        self.seed = seed
        self.distributed = distributed
        self.examples = fitting.train
        self.validation = fitting.validation
        self.found = fitting.found
        self.shows = fitting.shows
        self.batches = self._batches(fitting.train, seed=seed if config.shuffle else None)
        self.total_steps = config.total_steps(self.batches.steps_per_epoch)
        self.step = 0
        self._interval = config.validation_interval(self.batches.steps_per_epoch)
        check_schedule(config, self.total_steps)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        optimizer = _optimizer(self.model, config, fused=distributed.device.type in ("cpu", "cuda"))
        self._parallel = ParallelModel(self.model, optimizer, distributed, blocks=self.model.blocks)

    def run(self, *, status: Status = lambda stage: None) -> Iterator[FitStep]:
        """Train from the step after `self.step` to the last, yielding after each."""
        began = time.monotonic()
        if self.step == 0 and self.config.validate_at_start:
            yield FitStep(0, self.validate(status=status), validated=bool(self.validation), last=False)
        with closing(self._load(self.examples, self.batches.steps(self.step, self.total_steps))) as steps:
            mark = time.monotonic()
            for loaded in steps:
                metrics = self._train_step(loaded)
                metrics["step_seconds"] = time.monotonic() - mark  # waiting for data included
                self.step += 1
                last = self.step == self.total_steps or self._time_is_up(time.monotonic() - began)
                due = last or (self._interval is not None and self.step % self._interval == 0)
                if due:
                    metrics |= self.validate(status=status)
                yield FitStep(self.step, metrics, validated=due and bool(self.validation), last=last)
                if last:
                    return
                mark = time.monotonic()

    def validate(self, *, status: Status = lambda stage: None) -> dict[str, float]:
        """Measure the model on every validation set, each example once."""
        began = time.monotonic()
        metrics: dict[str, float] = {}
        for name, prefix in validation_prefixes(self.validation).items():
            status(prefix)
            # Found again, or something else, if the set is another since a resume.
            self.found.get(f"validation {name}", {}).clear()
            self.model.prepare_for_validation_step()
            with torch.no_grad():
                found = self.model.metrics(self._measure(self.validation[name]))
            self.model.finish_validation_step()
            metrics |= {f"{prefix}/{key}": value for key, value in found.items()}
        return {**metrics, "validation_seconds": time.monotonic() - began} if metrics else {}

    def shown(self, count: int) -> dict[str, Sequence[Shown]]:
        """Return up to so many examples of the validation sets as people look at them, the same ones each time.

        Every process calls it; the main one gets them.

        Raises:
            DataError: One of them cannot be read.
        """
        if self.shows is None or not self.validation:
            return {}
        model = self.whole_model()
        found: dict[str, Sequence[Shown]] = {}
        with self.distributed.together(), torch.no_grad():
            if self.distributed.is_main:
                model.prepare_for_validation_step()
                device = next(model.parameters()).device
                for name, examples in self.validation.items():
                    few = min(len(examples), max(1, count // len(self.validation)))
                    places = [index * len(examples) // few for index in range(few)]  # all over the set
                    found[name] = self.shows(model, to_device(examples.batch(places, [1.0] * few), device))
                model.finish_validation_step()
        return found

    def save(self, directory: Path, state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Write all that an exact continuation needs; one process does, with what `state` returned."""
        weights, optimizer = state
        save_tensors(directory / WEIGHTS_FILE, weights)
        save_state(directory, "optimizer", optimizer)
        found = {name: [[record, why] for record, why in list(each.items())] for name, each in self.found.items()}
        save_state(directory, "trainer", {"step": self.step, "seed": self.seed, "found": found})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trained weights and the optimizer's state for `save`; every process calls it.

        Afterwards each of them knows what any of them has found in the data.
        """
        for theirs in self.distributed.gather({name: dict(found) for name, found in self.found.items()}):
            for name, found in theirs.items():
                self.found[name].update(found)
        return self._parallel.state()

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint written by `save`; every process calls it.

        Raises:
            ConfigError: The checkpoint is of another seed.
            CheckpointError: It is of another model, or damaged.
        """
        progress: Any = load_state(directory, "trainer")
        if progress["seed"] != self.seed:
            raise ConfigError(
                f"{directory} was trained with seed={progress['seed']}, the config says seed={self.seed}; keep the "
                "seed to resume, or choose another output_dir to start afresh"
            )
        optimizer: Any = load_state(directory, "optimizer")
        try:
            self._parallel.load_state(load_tensors(directory / WEIGHTS_FILE), optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}; keep the model, or choose another output_dir") from error
        self.step = progress["step"]
        for name in self.found.keys() & progress["found"].keys():
            self.found[name].update(dict(progress["found"][name]))

    def whole_model(self) -> TrainableRewardModel:
        """Return the model with all its weights, for writing; every process calls it, the main one may use it."""
        model = self._parallel.whole(self.model)
        assert isinstance(model, TrainableRewardModel)
        return model

    def _train_step(self, loaded: LoadedStep) -> dict[str, float]:
        """Take one optimiser step; a step in which nothing counts moves nothing."""
        weight = self._weight_of(loaded)
        lr = learning_rate(self.config, self.step, self.total_steps)
        # Drawn anew for every step, so that a resumed run needs no state of the generators.
        torch.manual_seed(derive_seed(self.seed, "step", self.step, self.distributed.rank))
        self.model.prepare_for_training_step()
        loss, totals = self._accumulate(loaded.batches, weight) if weight > 0 else (0.0, self._only_count(loaded))
        loss, totals = self._over_processes(totals, loss=loss)
        norm = self._descend(loss, lr) if weight > 0 else float("nan")
        self.model.finish_training_step()
        return {
            **{f"train/{key}": value for key, value in self.model.metrics(totals).items()},
            "grad_norm": norm,
            "lr": lr,
            "samples": float(self.batches.samples(self.step + 1)),
            "epoch": (self.step + 1) / self.batches.steps_per_epoch,
        }

    def _accumulate(self, batches: Sequence[Batch], weight: float) -> tuple[float, Totals]:
        """Run every micro-batch forward and backward; return this process's sums."""
        scale = self._parallel.gradient_scale / weight
        loss_sum, totals = 0.0, dict[str, float]()
        for index, batch in enumerate(batches):
            with self._parallel.accumulating(last=index == len(batches) - 1):
                loss, found = self._forward(batch)
                (loss * scale).backward()
            loss_sum += float(loss.detach())
            _add(totals, found)
        return loss_sum, totals

    def _descend(self, loss: float, lr: float) -> float:
        """Clip the gradient, take the optimiser's step and return the gradient's norm.

        Raises:
            TrainingError: Loss or gradient are not finite; nothing was stepped.
        """
        norm = self._parallel.clip_gradients(self.config.max_grad_norm)
        optimizer = self._parallel.optimizer
        if not (math.isfinite(loss) and math.isfinite(norm)):
            optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"step {self.step + 1}: {'the gradient' if math.isfinite(loss) else 'the loss'} is NaN or infinite; "
                "nothing was updated, and the last checkpoint is intact: lower train.lr, lengthen train.warmup_steps, "
                "or compute with train.precision=fp32"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _measure(self, examples: Examples) -> Totals:
        limit = self.config.limit_validation_batches
        count = None if limit is None else limit * self.config.batch_size
        batches = self._batches(examples, seed=self.seed, length_window=SORTED, limit=count)
        totals: dict[str, float] = {}
        with closing(self._load(examples, batches.epoch())) as steps:
            for loaded in steps:
                self._weight_of(loaded)
                _add(totals, self._only_count(loaded))
        return self._over_processes(totals)[1]

    def _only_count(self, loaded: LoadedStep) -> Totals:
        """Return this process's sums over a step from which nothing is learnt."""
        totals: dict[str, float] = {}
        with torch.no_grad():
            for batch in loaded.batches:
                _add(totals, self._forward(batch)[1])
        return totals

    def _forward(self, batch: Batch) -> tuple[Tensor, Totals]:
        device = self.distributed.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self._parallel.module(to_device(batch, device))

    def _weight_of(self, loaded: LoadedStep) -> float:
        """Return what the batches of a step weigh over all processes.

        Raises:
            Exception: A batch could not be read, here or on another process.
        """
        weight = 0.0 if loaded.error else sum(self.model.weight(batch) for batch in loaded.batches)
        total, failures = self.distributed.sum(torch.tensor([weight, float(loaded.error is not None)]).double())
        if failures > 0:
            self.distributed.agree(loaded.error)
        return total.item()

    def _time_is_up(self, seconds: float) -> bool:
        limit = self.config.max_seconds
        if limit is None:
            return False
        return self.distributed.sum(torch.tensor(float(seconds >= limit))).item() > 0  # the first clock decides

    def _over_processes(self, totals: Totals, *, loss: float = 0.0) -> tuple[float, Totals]:
        """Return the sums of the loss and of each total over all processes, which all have the same keys."""
        total_loss, *sums = self.distributed.sum(torch.tensor([loss, *totals.values()], dtype=torch.float64)).tolist()
        return total_loss, dict(zip(totals, sums, strict=True))

    def _batches(
        self, examples: Examples, *, seed: int | None, length_window: int | None = None, limit: int | None = None
    ) -> Batches:
        config = self.config
        return Batches(
            examples.lengths,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens,
            seed=seed,
            length_window=config.length_window if length_window is None else length_window,
            limit=limit,
            rank=self.distributed.rank,
            world_size=self.distributed.world_size,
        )

    def _load(self, examples: Examples, steps: Any) -> Any:
        config = self.config
        device = self.distributed.device
        return load_steps(examples, steps, device=device, workers=config.workers, prefetch=config.prefetch)


def _optimizer(model: nn.Module, config: FitConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Return AdamW over what is trained; vectors (biases, norms) and scalars (temperatures) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("every weight of the model is frozen, so there is nothing to train; freeze less")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=config.betas, eps=config.adam_eps, fused=fused)


def _add(totals: dict[str, float], more: Totals) -> None:
    for key, value in more.items():
        totals[key] = totals.get(key, 0.0) + value
