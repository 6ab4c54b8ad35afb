"""`tiltflow evaluate`: a checkpoint or a model, its prompts and rewards, and a result file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltflow.commands.build import EMBEDDED_MODELS, build_policy, described, find_policy, run_folder
from tiltflow.commands.run_folder import warn
from tiltflow.config import (
    EvaluateConfig,
    RunConfig,
    check_group_size,
    configure_command,
    normalise_rewards,
    override_rewards,
    validate,
)
from tiltflow.data import load_prompts
from tiltflow.errors import ConfigError
from tiltflow.evaluation import EvaluationResult, evaluate, few_prompts_note
from tiltflow.policies.sd3 import SD3Config, SD3Policy
from tiltflow.rewards import (
    RewardArguments,
    RewardEngine,
    build_reward_model,
    check_prompts,
    check_reward,
    sealed_reward,
)
from tiltflow.runtime.distributed import Distributed
from tiltflow.training.trainer import load_weights


def run_evaluation(
    *,
    checkpoint: Path | None,
    model_name: str | None,
    prompts: str | None,
    rewards: str | None,
    overrides: Sequence[tuple[str, str]],
    output_dir: Path | None,
    name: str | None = None,
) -> EvaluationResult:
    """Evaluate a checkpoint, or a model without one; write the result as JSON and print it as `RESULT` lines.

    Args:
        checkpoint: A folder such as `outputs/<run>/latest`; the run's config is found beside it.
        model_name: A pretrained model instead.
        prompts: A named set or a file; None takes the run's evaluation prompts.
        rewards: YAML; None takes the run's `eval_rewards`, or else its `rewards`.
        overrides: Keys of `policy` and `evaluation`.
        output_dir: Where the results go; None: `evaluate/` beside the checkpoint (the run's own results are in
            `evaluations/`), or `outputs/evaluate`.
        name: Of the result; None: the checkpoint's or the model's.

    Raises:
        ConfigError: An argument is missing, unknown or wrong.
        CheckpointError: The checkpoint is damaged or none at all.
        RewardError: A reward is unknown, an option of it is wrong (both before any model is loaded), or it fails.
    """
    policy_values, found = find_policy(checkpoint, model_name)
    values = {"policy": policy_values, "evaluation": found.evaluation.model_dump() if found else {}}
    config: EvaluateConfig = configure_command(EvaluateConfig, values, overrides, command="evaluate")
    source = prompts or (found.data.eval_prompts if found else None)
    if source is None:
        raise ConfigError("evaluate --model_name needs --prompts: a named set such as geneval, or a file")
    lines = load_prompts(source, split="test", blocklist=found.data.blocklist if found else ())
    arguments = _checked_rewards(rewards, found, config.policy.model_name)
    check_group_size(arguments, config.evaluation.images_per_prompt, key="evaluation.images_per_prompt")
    check_prompts(arguments, lines, source=source)
    distributed = Distributed()
    try:
        with distributed.together():
            engine = RewardEngine(arguments, factory=lambda entry: build_reward_model(entry, distributed.accelerator))
            policy = _policy(config.policy, checkpoint, device=distributed.device, seed=found.seed if found else 0)
        directory = output_dir or (run_folder(checkpoint) / "evaluate" if checkpoint else Path("outputs", "evaluate"))
        with torch.no_grad(), policy.weights.using("ema"):
            result = evaluate(
                policy,
                engine,
                lines,
                config=config.evaluation,
                name=name or _name(checkpoint, config.policy.model_name),
                distributed=distributed,
            )
        result = replace(result, settings={**result.settings, **described(config.policy, source, arguments)})
        with distributed.together():
            if distributed.is_main:
                _tell(result, result.save(directory))
    finally:
        distributed.close()
    return result


def _tell(result: EvaluationResult, path: Path) -> None:
    """Print a result: its numbers, what speaks against them, and its file."""
    few = few_prompts_note(result.settings["prompts"])
    print("\n".join([*result.result_lines(), *([few] if few else []), f"result: {path}"]))
    for line in result.failure_lines():
        warn(line)


def _name(checkpoint: Path | None, model_name: str) -> str:
    """Return what a result is called: the checkpoint's folder, or the model's name as a file name."""
    return checkpoint.resolve().name if checkpoint else re.sub(r"[^\w.-]+", "_", model_name).strip("._-")


def _policy(config: SD3Config, checkpoint: Path | None, *, device: torch.device, seed: int) -> SD3Policy:
    policy = build_policy(config, device=device, seed=seed)
    if checkpoint is not None:
        load_weights(policy, checkpoint)
    return policy


def _checked_rewards(text: str | None, found: RunConfig | None, model_name: str) -> Sequence[RewardArguments]:
    """Return the rewards to measure with after checking their options, before any is built; they show no secret."""
    arguments = _rewards(text, found, model_name)
    for entry in arguments:
        check_reward(entry)
    return [sealed_reward(entry) for entry in arguments]


def _rewards(text: str | None, found: RunConfig | None, model_name: str) -> Sequence[RewardArguments]:
    """Return the rewards to measure with; a bare name stands for the run's, or the embedded world's, own entry."""
    known: Sequence[Mapping[str, Any]] = ()
    if found is not None:
        known = [entry.model_dump() for entry in (*found.eval_rewards, *found.rewards)]
    elif model_name in EMBEDDED_MODELS:
        known = normalise_rewards(EMBEDDED_MODELS[model_name].rewards)
    if text is not None:
        entries = override_rewards("rewards", text, known)
        return [validate(RewardArguments, entry, source="--rewards") for entry in entries]
    if found is None:
        raise ConfigError("evaluate --model_name needs --rewards, for example --rewards '[Geneval]'")
    return found.eval_rewards or found.rewards
