"""`tiltflow sample`: PNG files of prompts."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from tiltflow.commands.build import build_policy, find_policy
from tiltflow.config import SampleConfig, configure_command
from tiltflow.errors import ConfigError
from tiltflow.evaluation import EvaluationConfig
from tiltflow.report import save_grid
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.files import make_folder, remove, write_atomically
from tiltflow.training.rollout import rollout
from tiltflow.training.trainer import load_weights
from tiltflow.types import Prompt, SampleBatch

LIST = "samples.jsonl"  # which image is of which prompt: what `tiltflow score --images` reads


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
    """Generate images of prompts and write them one by one, with a list of them and a grid; returns the files.

    Images that an earlier call left in the folder are removed. The grid has a folder of its own: it is no sample.
    Sampled as the checkpoint's run is evaluated, unless the overrides (of `policy` and `sampler`) say otherwise.

    Raises:
        ConfigError: An argument is missing, unknown or wrong, or the folder holds another `samples.jsonl`.
        CheckpointError: The checkpoint is damaged or none at all, or the system refuses to write.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: make at least 1 image per prompt")
    former = _listed(output_dir / LIST)
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
    for path in former:
        remove(path)
    return _write(samples, output_dir, count=count)


def _write(samples: SampleBatch, folder: Path, *, count: int) -> list[Path]:
    """Write the list, the grid and the images; a kill on the way leaves nothing that the list does not name."""
    images = [folder / f"{index // count:03d}_{index % count:02d}.png" for index in range(len(samples))]
    lines = [
        json.dumps({"image": path.name, "prompt": prompt.text})
        for path, prompt in zip(images, samples.prompts, strict=True)
    ]
    write_atomically(folder / LIST, "".join(f"{line}\n" for line in lines))
    grid = folder / "grid" / "grid.png"
    save_grid(samples.images, grid, columns=count)
    for path, image in zip(images, samples.images, strict=True):
        save_grid(image[None], path, columns=1)
    return [grid, *images, folder / LIST]


def _listed(path: Path) -> list[Path]:
    """Return the images of this command that a list names."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        names = [str(json.loads(line)["image"]) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--output_dir {path.parent}: its {path.name} is no list of samples ({error!r}); remove it or give another "
            "folder"
        ) from error
    return [path.parent / name for name in names if re.fullmatch(r"\d{3,}_\d{2,}\.png", name)]
