"""`tiltflow doctor`: what works on this machine, reward by reward."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from tiltflow.errors import RewardError
from tiltflow.rewards import REWARDS, RewardModel, reward_class
from tiltflow.rewards.base import auto_device
from tiltflow.runtime.tables import aligned

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Finding:
    """What is known about one reward with its default options.

    Example: `Finding("OCR", "yes", "none needed", "cpu")`.
    """

    reward: str
    importable: str  # "yes", or what is missing, for some option at least
    weights: str  # "found", "none needed", what is missing, or the option that decides it
    device: str  # where it would compute


def examine() -> list[Finding]:
    """Look at every built-in reward without building it."""
    return [_examine(name, auto_device()) for name in sorted(REWARDS)]


def versions() -> list[tuple[str, str]]:
    """Return the packages that matter and the accelerator."""
    found: list[tuple[str, str]] = []
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "missing"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [*found, ("GPU", gpu)]


def doctor_report() -> str:
    """Return versions and findings as plain text."""
    rows = [("reward", "importable", "weights", "device")]
    rows += [(each.reward, each.importable, each.weights, each.device) for each in examine()]
    return "\n\n".join([aligned(versions()), aligned(rows)])


def _examine(name: str, device: str) -> Finding:
    try:
        cls = reward_class(name)
    except RewardError as error:
        return Finding(name, f"no: {error}", "-", "-")
    if cls.remote:
        device = "another process"
    return Finding(name, _importable(cls), _weights(cls), "cpu" if cls.cpu_only else device)


def _importable(cls: type[RewardModel]) -> str:
    absent = [package for package in cls.packages if find_spec(package) is None]
    if absent:
        return f"no: needs {', '.join(absent)}"
    lacking = [f"{option}: needs {name}" for option, name in cls.option_packages.items() if find_spec(name) is None]
    return f"yes, but {'; '.join(lacking)}" if lacking else "yes"


def _weights(cls: type[RewardModel]) -> str:
    """Say what the reward needs beside its packages, with its default options."""
    required = [name for name, field in cls.Options.model_fields.items() if field.is_required()]
    needed = list(dict.fromkeys([*cls.needed_options, *required]))
    if needed:  # without them nobody can tell what would be loaded
        return f"needs option {', '.join(needed)}"
    weights = cls.published_weights(cls.Options())
    missing = [each.label for each in weights if each.find() is None]
    found = "found" if weights else "none needed"
    return f"missing: {', '.join(missing)}" if missing else found
