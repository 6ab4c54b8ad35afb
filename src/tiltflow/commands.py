"""What each command does: builds the parts that a config names and puts them to work."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltflow.algorithms import ALGORITHMS, Snapshot
from tiltflow.config import (
    RunConfig,
    dump,
    load_run_config,
    normalise_rewards,
    parse_value,
    read_yaml,
    run_config,
    validate,
)
from tiltflow.data import PromptStream, load_prompts
from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.evaluation import EvaluationConfig, EvaluationResult, evaluate
from tiltflow.policies.sd3 import SD3Config, SD3Policy
from tiltflow.report import save_grid, write_report
from tiltflow.rewards import RewardArguments, RewardEngine, build_reward_model, check_metadata
from tiltflow.runtime.checkpoint import CheckpointStore, verify_checkpoint, write_atomically
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.tracking import ProgressBar, TrackerGroup, build_trackers
from tiltflow.training.pretrain import PretrainConfig, pretrain
from tiltflow.training.rollout import SamplerConfig, rollout
from tiltflow.training.trainer import Epoch, Trainer, check_geometry, load_weights
from tiltflow.types import Prompt

# Names of models that come with the package.
EMBEDDED_MODELS: Mapping[str, Path] = {"tiny_sd3": Path(__file__).parent / "demo" / "tiny_sd3"}
CONFIG_FILE = "config.yaml"
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


def train(source: str, overrides: Sequence[tuple[str, str]]) -> Path:
    """Post-train a policy; continues from `<output_dir>/latest` when it exists.

    Returns:
        The run's folder, with checkpoints, metrics, evaluations and `report.html` in it.
    """
    config = load_run_config(source, overrides)
    distributed = Distributed()
    run_dir = Path(str(config.output_dir))
    try:
        eval_prompts = _evaluation_prompts(config)
        trainer = build_trainer(config, distributed)
        _train(trainer, config, run_dir, eval_prompts, distributed)
    finally:
        distributed.close()
    return run_dir


def build_trainer(config: RunConfig, distributed: Distributed) -> Trainer:
    """Build everything that a run needs, the policy last, so that mistakes show before it is loaded.

    Touches no output.
    """
    check_geometry(config.train, distributed.world_size)
    prompts = load_prompts(config.data.prompts, split="train", blocklist=config.data.blocklist)
    stream = PromptStream(prompts, seed=config.seed, tag_shares=config.data.tag_shares)
    check_metadata(config.rewards, prompts, source=config.data.prompts)
    algorithm, _ = ALGORITHMS[config.train.trainer_type]
    engine = RewardEngine(
        config.rewards, factory=lambda arguments: build_reward_model(arguments, distributed.accelerator)
    )
    return Trainer(
        build_policy(config.policy, device=distributed.device, seed=config.seed),
        algorithm(config.algorithm),
        engine,
        stream,
        config=config.train,
        sampler=config.sampler,
        seed=config.seed,
        distributed=distributed,
    )


def build_policy(config: SD3Config, *, device: torch.device, seed: int) -> SD3Policy:
    """Build the policy, its model looked up among the embedded ones first."""
    embedded = EMBEDDED_MODELS.get(config.model_name)
    if embedded is not None:
        config = config.model_copy(update={"model_name": str(embedded)})
    return SD3Policy(config, device=device, seed=seed)


def _evaluation_prompts(config: RunConfig) -> list[Prompt]:
    prompts = load_prompts(config.data.eval_prompts, split="test", blocklist=config.data.blocklist)
    check_metadata(config.eval_rewards or config.rewards, prompts, source=config.data.eval_prompts)
    return prompts


def _train(
    trainer: Trainer, config: RunConfig, run_dir: Path, eval_prompts: Sequence[Prompt], distributed: Distributed
) -> None:
    store = CheckpointStore(run_dir, keep=config.checkpoint.keep)
    checkpoint = store.latest(on_skip=_warn if distributed.is_main else _ignore) if run_dir.exists() else None
    if checkpoint is not None:
        changed = changed_keys(run_dir / CONFIG_FILE, config)
        trainer.load(checkpoint)
        if distributed.is_main:
            for line in changed:
                _warn(f"{run_dir} goes on with another value: {line}")
            print(f"resuming {run_dir} after epoch {trainer.epoch}", file=sys.stderr)
    evaluator = Evaluator(config, trainer, eval_prompts, run_dir / "evaluations", distributed)
    trackers = TrackerGroup([])
    if distributed.is_main:
        make_folder(run_dir)
        write_atomically(run_dir / CONFIG_FILE, dump(config))
        trackers = build_trackers(
            config.tracking,
            run_dir,
            run_name=run_dir.name,
            run_config=config.model_dump(mode="json"),
            resume_step=trainer.epoch + 1 if checkpoint is not None else None,
        )
    if config.policy.unload_text_encoders:
        _encode_all(trainer, eval_prompts)
    enabled = distributed.is_main and config.tracking.console
    with trackers, ProgressBar(config.train.epochs, start=trainer.epoch, title=run_dir.name, enabled=enabled) as bar:
        evaluator.once("before", "ref", epoch=0, status=bar.status)
        for epoch in trainer.run(status=bar.status):
            _after_epoch(epoch, trainer, config, store, trackers, bar, distributed)
        evaluator.once("after", "ema", epoch=trainer.epoch, status=bar.status)
    if distributed.is_main:
        print(f"report: {write_report(run_dir)}")


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
    distributed: Distributed,
) -> None:
    """Log, save when due, and move the progress bar."""
    metrics = epoch.metrics
    trackers.log(metrics, step=epoch.number)
    last = epoch.number == config.train.epochs
    with distributed.together():
        if distributed.is_main and (last or epoch.number % config.train.save_every == 0):
            store.save(epoch.number, trainer.save)
            write_report(store.directory)
    generated = config.train.num_prompts_per_epoch * config.train.group_size
    bar.advance(reward=metrics[f"reward/{trainer.engine.names[0]}/mean"], rate=generated / metrics["seconds/epoch"])


class Evaluator:
    """Evaluates snapshots of a run's policy on its evaluation prompts, each once per run."""

    def __init__(
        self, config: RunConfig, trainer: Trainer, prompts: Sequence[Prompt], directory: Path, distributed: Distributed
    ):
        self._trainer = trainer
        self._prompts = prompts
        self._config = config.evaluation
        self._directory = directory
        self._distributed = distributed
        self._engine = (
            RewardEngine(
                config.eval_rewards, factory=lambda reward: build_reward_model(reward, distributed.accelerator)
            )
            if config.eval_rewards
            else trainer.engine
        )

    def once(self, name: str, snapshot: Snapshot, *, epoch: int, status: Callable[[str], None]) -> None:
        """Evaluate a snapshot, shared by all processes, unless its result for this epoch is already there."""
        if self._distributed.gather(self._is_done(name, epoch))[0]:
            return
        policy = self._trainer.policy
        with torch.no_grad(), policy.weights.using(snapshot):
            result = evaluate(
                policy,
                self._engine,
                self._prompts,
                config=self._config,
                name=name,
                image_dir=self._directory,
                distributed=self._distributed,
                progress=lambda done, total: status(f"evaluation '{name}' {done}/{total}"),
            )
        with self._distributed.together():
            if self._distributed.is_main:
                replace(result, settings={**result.settings, **self._settings(epoch)}).save(self._directory)

    def _settings(self, epoch: int) -> dict[str, Any]:
        return {
            **self._config.model_dump(mode="json"),
            "rewards": [reward.model_dump(mode="json") for reward in self._engine.rewards],
            "epoch": epoch,
        }

    def _is_done(self, name: str, epoch: int) -> bool:
        path = self._directory / f"{name}.json"
        if not path.exists():
            return False
        return self._settings(epoch).items() <= EvaluationResult.load(path).settings.items()


def run_evaluation(
    *,
    checkpoint: Path | None,
    model_name: str | None,
    prompts: str | None,
    rewards: str | None,
    overrides: Sequence[tuple[str, str]],
    output_dir: Path | None,
) -> EvaluationResult:
    """Evaluate a checkpoint, or a model without one, and write its results as JSON."""
    policy_config, found = _policy_of(checkpoint, model_name)
    device = Distributed().device
    values = found.evaluation.model_dump() if found else {}
    config = validate(EvaluationConfig, {**values, **_flat(overrides)}, source="evaluate")
    source = prompts or (found.data.eval_prompts if found else None)
    if source is None:
        raise ConfigError("evaluate --model_name needs --prompts: a named set such as geneval, or a file")
    lines = load_prompts(source, split="test")
    arguments = _evaluation_rewards(rewards, found)
    check_metadata(arguments, lines, source=source)
    engine = RewardEngine(arguments)
    policy = build_policy(policy_config, device=device, seed=found.seed if found else 0)
    name = "pretrained"
    if checkpoint is not None:
        load_weights(policy, checkpoint)
        name = checkpoint.resolve().name
    directory = output_dir or (checkpoint.parent / "evaluations" if checkpoint else Path("outputs") / "evaluations")
    with torch.no_grad(), policy.weights.using("ema"):
        result = evaluate(policy, engine, lines, config=config, name=name, image_dir=directory)
    result.save(directory)
    return result


def run_sampling(
    *,
    checkpoint: Path | None,
    model_name: str | None,
    prompts: Sequence[str],
    count: int,
    seed: int,
    overrides: Sequence[tuple[str, str]],
    output_dir: Path,
) -> list[Path]:
    """Generate images of prompts and write them one by one and as a grid; returns the files."""
    if count < 1:
        raise ConfigError(f"--count {count}: make at least 1 image per prompt")
    policy_config, found = _policy_of(checkpoint, model_name)
    values = found.sampler.model_dump() if found else {}
    sampler = validate(SamplerConfig, {**values, **_flat(overrides)}, source="sample")
    policy = build_policy(policy_config, device=Distributed().device, seed=seed)
    if checkpoint is not None:
        load_weights(policy, checkpoint)
    with torch.no_grad(), policy.weights.using("ema"):
        samples = rollout(
            policy,
            [Prompt(text) for text in prompts],
            groups=list(range(len(prompts))),
            group_size=count,
            sampler=sampler,
            seed=(seed, "sample"),
        )
    make_folder(output_dir)
    files = [output_dir / "grid.png"]
    save_grid(samples.images, files[0], columns=count)
    for index, image in enumerate(samples.images):
        files.append(output_dir / f"{index // count:03d}_{index % count:02d}.png")
        save_grid(image[None], files[-1], columns=1)
    return files


def run_pretraining(config: PretrainConfig) -> Path:
    """Make a model from scratch, telling every fifty steps how far it is."""
    began = time.perf_counter()

    def log(stage: str, step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"{stage} {step}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    return pretrain(config, log=log)


def _policy_of(checkpoint: Path | None, model_name: str | None) -> tuple[SD3Config, RunConfig | None]:
    """Return the policy's config, from beside the checkpoint or for a bare model name."""
    if checkpoint is None and model_name is None:
        raise ConfigError("give --checkpoint outputs/<run>/latest or --model_name")
    if checkpoint is not None and model_name is not None:
        raise ConfigError("give --checkpoint or --model_name, not both: a checkpoint knows its model")
    if checkpoint is None:
        small = {"height": 64, "width": 64, "max_sequence_length": 1} if model_name in EMBEDDED_MODELS else {}
        return SD3Config.model_validate({"model_name": model_name, **small}), None
    verify_checkpoint(checkpoint)
    path = checkpoint.parent / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: the config that made it is not beside it; expected {path}")
    config = run_config(read_yaml(path), source=str(path))
    return config.policy, config


def _evaluation_rewards(text: str | None, found: RunConfig | None) -> Sequence[RewardArguments]:
    if text is not None:
        entries = normalise_rewards(parse_value("rewards", text), key="--rewards")
        known = {reward.reward_model: reward for reward in (found.rewards if found else ())}
        return [
            known[entry["reward_model"]]
            if set(entry) == {"name", "reward_model"} and entry["reward_model"] in known
            else validate(RewardArguments, entry, source="--rewards")
            for entry in entries
        ]
    if found is None:
        raise ConfigError("evaluate --model_name needs --rewards, for example --rewards '[Geneval]'")
    return found.eval_rewards or found.rewards


def _encode_all(trainer: Trainer, eval_prompts: Sequence[Prompt]) -> None:
    """Encode every prompt that the run can ask for, then drop the text encoders."""
    policy = trainer.policy
    assert isinstance(policy, SD3Policy)
    policy.remember(["", *(prompt.text for prompt in (*trainer.stream.prompts, *eval_prompts))])
    policy.unload_text_encoders()


def make_folder(path: Path) -> None:
    """Make an output folder.

    Raises:
        ConfigError: The system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={str(path)!r} cannot be made: {error}; choose another") from error


def _flat(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {key.rpartition(".")[2]: parse_value(key, value) for key, value in overrides}


def _ignore(message: str) -> None:
    """Say nothing: the main process has said it."""


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
