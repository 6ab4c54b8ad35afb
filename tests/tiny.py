"""A small random Stable Diffusion 3 of the real classes, and run configs that use it: nothing is downloaded."""

from pathlib import Path
from typing import Any

from tiltflow.config import RunConfig, run_config
from tiltflow.demo.prompts import all_prompts
from tiltflow.policies.tiny_sd3 import TinySD3Config, build_tiny_sd3

SIZES = TinySD3Config(
    image_size=32,
    vae_channels=(8, 8, 8),
    layers=2,
    heads=2,
    head_dim=16,
    text_widths=(32, 32),
    text_layers=(2, 2),
)


def save_random_sd3(directory: Path) -> Path:
    """Write a random pipeline whose outputs depend on the prompt and the time, and return its folder."""
    pipe = build_tiny_sd3(SIZES, [line["prompt"] for line in all_prompts()], seed=3)
    pipe.save_pretrained(directory)
    return directory


def run_values(model: Path, output_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a seconds-long run, as a nested mapping; sections are merged over it."""
    values: dict[str, Any] = {
        "seed": 7,
        "output_dir": str(output_dir),
        "policy": {
            "model_name": str(model),
            "finetune": "lora",
            "lora": {"rank": 2, "alpha": 4},
            "height": 32,
            "width": 32,
            "max_sequence_length": 1,
            "precision": "fp32",
        },
        "data": {"prompts": "shapes", "eval_prompts": "shapes"},
        "algorithm": {"reward_multiplier": 2.0, "num_noisings": 2},
        "train": {
            "epochs": 4,
            "num_prompts_per_epoch": 4,
            "group_size": 2,
            "batch_size": 4,
            "lr": 1e-3,
            "save_every": 1,
        },
        "sampler": {"num_steps": 2, "guidance_scale": 2.0, "batch_size": 4},
        "evaluation": {
            "num_steps": 2,
            "guidance_scale": 2.0,
            "images_per_prompt": 1,
            "max_prompts": 6,
            "keep_images": 2,
        },
        "rewards": [{"name": "brightness", "reward_model": "tests.rewards_for_tests.Brightness"}],
        "tracking": {"console": False},
    }
    for section, overrides in sections.items():
        own = values.get(section)
        values[section] = {**own, **overrides} if isinstance(own, dict) else overrides
    return values


def tiny_config(model: Path, output_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return the checked config of `run_values`."""
    return run_config(run_values(model, output_dir, **sections), source="tests")
