"""From a config to the objects that it names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiltflow.algorithms import ALGORITHMS
from tiltflow.config import RunConfig, is_reward_config, read_yaml, run_config
from tiltflow.data import PromptStream, load_prompts
from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.policies.sd3 import SD3Config, SD3Policy
from tiltflow.rewards import (
    RewardArguments,
    RewardEngine,
    RewardModel,
    build_reward_model,
    check_prompts,
    identity,
    shared_entries,
)
from tiltflow.runtime.checkpoint import verify_checkpoint
from tiltflow.runtime.distributed import Distributed
from tiltflow.training.trainer import Trainer, check_geometry

CONFIG_FILE = "config.yaml"  # beside the checkpoints of a run


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that comes with the package, and what commands need to know that have no config."""

    folder: Path
    policy: Mapping[str, Any]  # keys of `policy:` that fit it
    rewards: tuple[Mapping[str, Any], ...]  # entries of `rewards:` that fit its world


EMBEDDED_MODELS: Mapping[str, EmbeddedModel] = {
    "tiny_sd3": EmbeddedModel(
        folder=Path(__file__).parents[1] / "demo" / "tiny_sd3",
        policy={"max_sequence_length": 1},
        rewards=({"reward_model": "Geneval", "detector": "shapes"},),
    ),
    "tiny_words": EmbeddedModel(
        folder=Path(__file__).parents[1] / "demo" / "tiny_words",
        policy={"max_sequence_length": 1},
        rewards=({"reward_model": "OCR"},),
    ),
}


def build_engines(config: RunConfig, distributed: Distributed) -> tuple[RewardEngine, RewardEngine]:
    """Build the engines of the training rewards and of the evaluation rewards (the same one where none are given).

    Equal rewards of the two share one model.

    Raises:
        RewardError: A reward cannot be built here; where only another process failed, a TiltflowError that names it.
    """
    models: dict[str, RewardModel] = {}
    shared = shared_entries([*config.rewards, *config.eval_rewards])

    def factory(arguments: RewardArguments) -> RewardModel:
        key = identity(arguments)
        if key not in models:
            models[key] = build_reward_model(shared[key], distributed.accelerator)
        return models[key]

    with distributed.together():
        training = RewardEngine(config.rewards, factory=factory)
        return training, RewardEngine(config.eval_rewards, factory=factory) if config.eval_rewards else training


def build_trainer(config: RunConfig, distributed: Distributed, engine: RewardEngine | None = None) -> Trainer:
    """Build everything that a run needs, the policy last, so that mistakes show before it is loaded.

    Touches no output.

    Args:
        config: The run.
        distributed: The processes.
        engine: The training rewards; None builds them.
    """
    with distributed.together():
        check_geometry(config.train, distributed.world_size)
        prompts = load_prompts(config.data.prompts, split="train", blocklist=config.data.blocklist)
        stream = PromptStream(prompts, seed=config.seed, tag_shares=config.data.tag_shares)
        check_prompts(config.rewards, prompts, source=config.data.prompts)
    algorithm, _ = ALGORITHMS[config.train.trainer_type]
    engine = engine or build_engines(config, distributed)[0]
    with distributed.together():
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
    """Build the policy, its model looked up among the embedded ones first.

    Raises:
        ConfigError: The model cannot be found or loaded.
    """
    embedded = EMBEDDED_MODELS.get(config.model_name)
    if embedded is not None:
        if not embedded.folder.is_dir():
            raise ConfigError(
                f"policy.model_name={config.model_name!r}: this install does not have its weights ({embedded.folder}); "
                f"make them with `tiltflow pretrain {config.model_name}` and give the folder that it writes"
            )
        config = config.model_copy(update={"model_name": str(embedded.folder)})
    return SD3Policy(config, device=device, seed=seed)


def described(policy: SD3Config, prompts: str, rewards: Sequence[RewardArguments]) -> dict[str, Any]:
    """Return what was measured with what, as the settings of an evaluation result."""
    return {
        "policy": policy.model_dump(mode="json"),
        "prompt_source": prompts,
        "rewards": [entry.model_dump(mode="json") for entry in rewards],
    }


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that made a checkpoint, which may be given as `.`."""
    return checkpoint.absolute().parent


def find_policy(checkpoint: Path | None, model_name: str | None) -> tuple[dict[str, Any], RunConfig | None]:
    """Return the values of `policy:` for a checkpoint or a bare model, and the config that made the checkpoint.

    Raises:
        ConfigError: Neither or both are given, or the checkpoint is of a reward model.
        CheckpointError: The checkpoint is damaged or none at all, or its config is not beside it.
    """
    if checkpoint is not None and model_name is not None:
        raise ConfigError("give --checkpoint or --model_name, not both: a checkpoint knows its model")
    if model_name is not None:
        embedded = EMBEDDED_MODELS.get(model_name)
        return {"model_name": model_name, **(embedded.policy if embedded else {})}, None
    if checkpoint is None:
        raise ConfigError("give --checkpoint outputs/<run>/latest or --model_name")
    verify_checkpoint(checkpoint)
    path = run_folder(checkpoint) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint}: the config that made it is not beside it; expected {path}: copy the run's {CONFIG_FILE} "
            "there"
        )
    values = read_yaml(path)
    if is_reward_config(values):
        raise ConfigError(
            f"{checkpoint} is of a reward model, which makes no images; measure it with: "
            f"tiltflow evaluate-reward {path.parent / 'model'} DATA"
        )
    # What the run was trained on need not be importable to look at its images.
    found = run_config(values, source=str(path), check_rewards=False)
    return found.policy.model_dump(mode="json"), found
