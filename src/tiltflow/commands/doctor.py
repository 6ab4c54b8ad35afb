"""`tiltflow doctor`: what works on this machine, reward by reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from tiltflow.errors import RewardError
from tiltflow.rewards import REWARDS, reward_class

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Finding:
    """What is known about one reward with its default options.

    Example: `Finding("OCR", "yes", "none needed", "cpu")`.
    """

    reward: str
    importable: str  # "yes", or what is missing
    weights: str  # "found", "none needed", "on its server", or what is missing
    device: str  # where it would compute


def examine() -> list[Finding]:
    """Look at every built-in reward without building it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [_examine(name, device) for name in sorted(REWARDS)]


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
    return "\n\n".join([_table(versions()), _table(rows)])


def _examine(name: str, device: str) -> Finding:
    try:
        cls = reward_class(name)
    except RewardError as error:
        return Finding(name, f"no: {error}", "-", "-")
    absent = [package for package in cls.packages if find_spec(package) is None]
    importable = f"no: needs {', '.join(absent)}" if absent else "yes"
    if cls.remote:
        return Finding(name, importable, "on its server", "its server's")
    weights = cls.published_weights(cls.Options())
    missing = [each.label for each in weights if each.find() is None]
    found = "found" if weights else "none needed"
    return Finding(
        name,
        importable,
        f"missing: {', '.join(missing)}" if missing else found,
        device,
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
