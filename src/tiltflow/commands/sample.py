"""`tiltflow sample`: PNG files of prompts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tiltflow.commands.build import build_policy, find_policy
from tiltflow.config import SampleConfig, configure_command
from tiltflow.errors import ConfigError
from tiltflow.evaluation import EvaluationConfig
from tiltflow.report import save_grid
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.files import make_folder
from tiltflow.training.rollout import rollout
from tiltflow.training.trainer import load_weights
from tiltflow.types import Prompt


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
    """Generate images of prompts and write them one by one and as a grid; returns the files.

    Sampled as the checkpoint's run is evaluated, unless the overrides (of `policy` and `sampler`) say otherwise.

    Raises:
        ConfigError: An argument is missing, unknown or wrong.
        CheckpointError: The checkpoint is damaged or none at all, or the system refuses to write.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: make at least 1 image per prompt")
    policy_values, found = find_policy(checkpoint, model_name)
    evaluation = found.evaluation if found else EvaluationConfig()
    values = {"policy": policy_values, "sampler": evaluation.sampler.model_dump()}
    config: SampleConfig = configure_command(SampleConfig, values, overrides, command="sample")
    distributed = Distributed()
    is_main = distributed.is_main
    try:
        policy = build_policy(config.policy, device=distributed.device, seed=seed)
        if checkpoint is not None:
            load_weights(policy, checkpoint)
        with torch.no_grad(), policy.weights.using("ema"):
            samples = rollout(
                policy,
                [Prompt(text) for text in prompts],
                groups=list(range(len(prompts))),
                group_size=count,
                sampler=config.sampler,
                seed=(seed, "sample"),
            )
    finally:
        distributed.close()
    if not is_main:
        return []
    make_folder(output_dir)
    files = [output_dir / "grid.png"]
    save_grid(samples.images, files[0], columns=count)
    for index, image in enumerate(samples.images):
        files.append(output_dir / f"{index // count:03d}_{index % count:02d}.png")
        save_grid(image[None], files[-1], columns=1)
    return files
