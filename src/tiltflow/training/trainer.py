"""The training loop: rollout, reward, advantage, update, follow; one epoch is one optimiser update."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.algorithms.base import Algorithm, Velocities
from tiltflow.data.stream import PromptStream
from tiltflow.errors import ConfigError, RewardError, RewardOutage, TiltflowError, TrainingError
from tiltflow.policies.base import Policy
from tiltflow.rewards.engine import RewardEngine, Scoring
from tiltflow.runtime.checkpoint import load_state, load_tensors, save_state, save_tensors
from tiltflow.runtime.distributed import Distributed, check_divisible
from tiltflow.runtime.randomness import generator
from tiltflow.training.advantages import group_advantages
from tiltflow.training.rollout import SamplerConfig, rollout
from tiltflow.types import Beta, Config, RewardTable, SampleBatch, ScoredBatch

WEIGHTS_FILE = "weights.safetensors"


class TrainConfig(Config):
    """How long and on how much to train; epoch sizes are totals over all processes."""

    trainer_type: Literal["ram"] = "ram"
    epochs: int = Field(default=1000, ge=1)
    num_prompts_per_epoch: int = 48
    group_size: int = 24
    batch_size: int = 8  # noised points per forward and backward pass of one process
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(default=1e-4, ge=0)
    adam_eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    advantage_std: Literal["global", "group"] = "global"
    max_failure_fraction: float = Field(default=0.5, ge=0, le=1)
    save_every: int = Field(default=1, ge=1)  # epochs
    evaluate_every: int | None = Field(default=None, ge=1)  # epochs; None: only before and after
    early_stop: int | None = Field(default=None, ge=1)  # evaluations in a row that look like reward hacking

    @model_validator(mode="after")
    def _aggregation_has_its_std(self) -> "TrainConfig":
        if self.advantage_aggregation == "gdpo" and self.advantage_std == "group":
            raise ValueError(
                "advantage_aggregation=gdpo normalises each reward by its group already; leave advantage_std=global"
            )
        return self


@dataclass(frozen=True)
class Epoch:
    """What one epoch leaves behind for whoever watches: no images, which would outlive their use by an epoch.

    `metrics` are the same on every rank; `table` is this rank's.
    """

    number: int
    metrics: Mapping[str, float]
    table: RewardTable = field(repr=False)


class Trainer:
    """Post-trains a policy with one algorithm against the rewards of one engine."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        engine: RewardEngine,
        stream: PromptStream,
        *,
        config: TrainConfig,
        sampler: SamplerConfig,
        seed: int,
        distributed: Distributed,
    ):
        check_geometry(config, distributed.world_size)
        self.policy = policy
        self.algorithm = algorithm
        self.engine = engine
        self.stream = stream
        self.config = config
        self.sampler = sampler
        self.seed = seed
        self.distributed = distributed
        self.epoch = 0
        self.optimizer = torch.optim.AdamW(
            policy.weights.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            eps=config.adam_eps,
        )

    def run(self, *, status: Callable[[str], None] = lambda stage: None) -> Iterator[Epoch]:
        """Train from the epoch after `self.epoch` to the last, yielding after each."""
        while self.epoch < self.config.epochs:
            yield self.run_epoch(self.epoch + 1, status=status)

    def run_epoch(self, epoch: int, *, status: Callable[[str], None] = lambda stage: None) -> Epoch:
        """Run one epoch, counted from 1, and return its metrics."""
        clock = _Clock()
        alone = self.distributed.world_size == 1  # else one rank would leave the others in the middle of the rollout
        with self.engine.begin(group_size=self.config.group_size, stop_early=alone) as scoring:
            status("rollout")
            with clock.stage("rollout"), _early_outage() if alone else nullcontext():
                samples = self._rollout(epoch, status, submit=scoring.add_batch)
            status("reward")
            with clock.stage("reward"):
                table = self._score(scoring)
        scored, reward_metrics = self._advantages(samples, table)
        del samples
        status("update")
        with clock.stage("update"):
            update_metrics = self._update(scored, epoch)
        weights = self.policy.weights
        weights.follow("old", decay=self.algorithm.old_decay(epoch))
        weights.follow("ema", decay=self.config.ema_decay)
        self.epoch = epoch
        return Epoch(epoch, {**reward_metrics, **update_metrics, **clock.metrics()}, table)

    def save(self, directory: Path) -> None:
        """Write all that an exact continuation needs, and the evaluation weights in the family's stock format."""
        save_tensors(directory / WEIGHTS_FILE, self.policy.weights.state())
        save_state(directory, "optimizer", self.optimizer.state_dict())
        save_state(directory, "trainer", {"epoch": self.epoch, "seed": self.seed})
        with torch.no_grad(), self.policy.weights.using("ema"):
            self.policy.export(directory)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint written by `save`.

        Raises:
            ConfigError: The checkpoint is of another model, LoRA rank or seed.
        """
        state = load_state(directory, "trainer")
        assert isinstance(state, dict)
        if state["seed"] != self.seed:
            raise ConfigError(
                f"{directory} was trained with seed={state['seed']}, the config says seed={self.seed}; keep the seed "
                "to resume, or choose another output_dir to start afresh"
            )
        load_weights(self.policy, directory)
        optimizer = load_state(directory, "optimizer")
        assert isinstance(optimizer, dict)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer)
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)  # the config decides on lr and decay, the checkpoint on the moments
        self.epoch = state["epoch"]

    def _rollout(self, epoch: int, status: Callable[[str], None], submit: Callable[[SampleBatch], None]) -> SampleBatch:
        groups = self.distributed.share(self.stream.epoch(epoch, self.config.num_prompts_per_epoch))
        with torch.no_grad(), self.policy.weights.using("old"):
            return rollout(
                self.policy,
                [group.prompt for group in groups],
                groups=[group.id for group in groups],
                group_size=self.config.group_size,
                sampler=self.sampler,
                seed=(self.seed, "rollout"),
                progress=lambda done, total: status(f"rollout {done}/{total}"),
                submit=submit,
                keep_images=False,
            )

    def _score(self, scoring: Scoring) -> RewardTable:
        try:
            with self.distributed.together():
                table = scoring.finish()
        except TiltflowError as error:  # every rank has one: its own, or that another rank failed
            raise RewardOutage(str(error)) from error
        self._limit_failures(table)
        return table

    def _limit_failures(self, table: RewardTable) -> None:
        failed = table.scores.isnan().double().sum(dim=0)
        counts = self.distributed.sum(torch.cat([failed, torch.tensor([float(len(table.scores))]).double()]))
        weights = self.engine.weights.tolist()
        for name, weight, count in zip(table.names, weights, counts[:-1].tolist(), strict=True):
            fraction = count / counts[-1].item()
            if weight != 0 and fraction > self.config.max_failure_fraction:
                reasons = sorted({f"{f.kind}: {f.message}" for f in table.failures if f.reward == name})
                raise RewardOutage(
                    f"reward {name!r} failed on {fraction:.0%} of the epoch's samples, more than "
                    f"train.max_failure_fraction={self.config.max_failure_fraction:.0%}; causes on this rank: "
                    f"{'; '.join(reasons[:3]) or 'none'}; mend the reward and run again"
                )

    def _advantages(self, samples: SampleBatch, table: RewardTable) -> tuple[ScoredBatch, dict[str, float]]:
        # A reward of weight 0 is only watched: its failures cost no sample.
        valid = (~table.scores.isnan() | (self.engine.weights == 0)).all(dim=1)
        advantages = group_advantages(
            table.scores,
            samples.groups,
            weights=self.engine.weights,
            aggregation=self.config.advantage_aggregation,
            std=self.config.advantage_std,
            valid=valid,
            reduce=self.distributed.sum,
        )
        kept = valid.nonzero().flatten()
        rows = kept.to(samples.latents.device)
        prompts = [samples.prompts[row] for row in kept.tolist()]
        scored = ScoredBatch(prompts, samples.latents[rows], advantages[kept], samples.groups[kept])
        return scored, {**_reward_metrics(table, self.distributed), **_info_metrics(table, self.distributed)}

    def _update(self, scored: ScoredBatch, epoch: int) -> dict[str, float]:
        """Accumulate the loss of every noised point of the epoch, then take one optimiser step."""
        total = self.distributed.sum(torch.tensor(float(len(scored)))).item()
        if total == 0:
            raise RewardOutage("no sample of the epoch has a valid reward: there is nothing to learn from")
        policy = Velocities(self.policy.velocity, self.policy.weights.using)
        sigmas = self.policy.sigmas(self.sampler.num_steps).cpu()
        # Every rank sums the same names, also one that has no row to learn from.
        # They stay on the device until the end: reading one would wait for the batch that made it.
        zero = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        sums = dict.fromkeys(("loss", *self.algorithm.metric_names), zero)
        for group in scored.groups.unique().tolist():
            rows = (scored.groups == group).nonzero().flatten()
            noised = self.algorithm.noise(
                scored.latents[rows.to(scored.latents.device)],
                scored.advantages[rows],
                self.policy.conditioning([scored.prompts[int(rows[0])].text]),
                sigmas=sigmas,
                generator=generator(self.seed, "update", epoch, group),
            )
            for start in range(0, len(noised), self.config.batch_size):
                part = noised[start : start + self.config.batch_size]
                share = len(part) / len(noised) * len(rows) / total
                output = self.algorithm.loss(part, policy)
                (output.loss * share).backward()
                for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                    sums[name] = sums[name] + share * value.double()
        return {**self._step(), **self._sum_metrics(sums)}

    def _step(self) -> dict[str, float]:
        parameters = self.policy.weights.parameters()
        self.distributed.sum_gradients(parameters)
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))
        if not torch.isfinite(norm):
            raise TrainingError(
                "the gradient is NaN or infinite; nothing was updated. The last checkpoint is intact: lower train.lr "
                "or the algorithm's multiplier, or compute with policy.precision=fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm.item(), "lr": self.optimizer.param_groups[0]["lr"]}

    def _sum_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        values = self.distributed.sum(torch.stack(list(sums.values())).cpu())
        return dict(zip(sums, values.tolist(), strict=True))


def check_geometry(config: TrainConfig, world_size: int) -> None:
    """Check that the epoch's sizes fit each other and the number of processes.

    Raises:
        GeometryError: They do not; names the nearest legal values.
    """
    if config.group_size < 2:
        raise ConfigError(
            f"train.group_size={config.group_size}: an advantage compares samples of one prompt; use at least 2"
        )
    if config.batch_size < 1:
        raise ConfigError(f"train.batch_size={config.batch_size}: use at least 1")
    check_divisible(
        "train.num_prompts_per_epoch",
        config.num_prompts_per_epoch,
        world_size,
        why=f"{world_size} process(es) take equal shares of whole groups",
    )


def load_weights(policy: Policy, directory: Path) -> None:
    """Load theta, `old` and `ema` of a checkpoint into a policy.

    Raises:
        ConfigError: The checkpoint is of another model or LoRA rank.
    """
    state = load_tensors(directory / WEIGHTS_FILE)
    try:
        policy.weights.load_state(state)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{directory} does not fit this config's policy: {error}; keep policy.model_name, policy.finetune and "
            "policy.lora as they were, or choose another output_dir"
        ) from error


def _reward_metrics(table: RewardTable, distributed: Distributed) -> dict[str, float]:
    """Return mean, standard deviation and failures of each reward over all ranks."""
    scores = table.scores.double()
    valid = ~scores.isnan()
    filled = torch.where(valid, scores, torch.zeros_like(scores))
    moments = torch.stack([valid.double().sum(0), filled.sum(0), filled.square().sum(0), (~valid).double().sum(0)])
    count, total, square, failed = distributed.sum(moments)
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    metrics: dict[str, float] = {}
    for index, name in enumerate(table.names):
        metrics[f"reward/{name}/mean"] = mean[index].item()
        metrics[f"reward/{name}/std"] = std[index].item()
        metrics[f"failures/{name}"] = failed[index].item()
    return metrics


def _info_metrics(table: RewardTable, distributed: Distributed) -> dict[str, float]:
    """Return the means over all ranks of what the rewards tell beside their scores, where that is a number."""
    own: dict[str, tuple[float, int]] = {}
    for name, columns in table.extra_info.items():
        for key, cells in columns.items():
            values = [float(cell) for cell in cells if isinstance(cell, bool | int | float) and math.isfinite(cell)]
            if values:
                own[f"info/{name}/{key}"] = (sum(values), len(values))
    parts = distributed.gather(own)
    keys = dict.fromkeys(key for part in parts for key in part)
    sums = {key: [part[key] for part in parts if key in part] for key in keys}
    return {key: sum(total for total, _ in found) / sum(count for _, count in found) for key, found in sums.items()}


@contextmanager
def _early_outage() -> Iterator[None]:
    """Give the epoch up when a reward is known to have failed before the last sample is made."""
    try:
        yield
    except RewardError as error:
        raise RewardOutage(str(error)) from error


class _Clock:
    """Seconds per stage of an epoch."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] = time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        return {**seconds, "seconds/epoch": time.perf_counter() - self._start}
