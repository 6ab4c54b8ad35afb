"""LoRA in a sequence classifier: the head is trained whole, and survives saving, merging and loading."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tiltflow.errors import RewardError
from tiltflow.types import Config

ADAPTER_FILE: Final = "adapter_config.json"
HEADS: Final = ("score", "classifier", "classification_head")  # what transformers calls the head of a classifier
_NAME: Final = "default"  # peft's, of the one adapter


class LoraSettings(Config):
    """Low-rank updates of the network's linear layers; the head is trained in full beside them."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)  # the update counts alpha / rank
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"  # ends of layer names, such as q_proj


def add_lora(classifier: Any, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Put LoRA into a classifier, which is changed; only LoRA and the head ask for gradients then.

    Raises:
        RewardError: No layer has such a name, or the head is not found.
    """
    heads = [name for name, _ in classifier.named_children() if name in HEADS]
    if not heads:
        names = ", ".join(name for name, _ in classifier.named_children())
        raise RewardError(f"LoRA: {type(classifier).__name__} has no head called one of {HEADS}; it has: {names}")
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        modules_to_save=heads,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in classifier.modules()),  # GPT-2's own linear layer
    )
    try:
        with torch.random.fork_rng(devices=[]), _without_old_names():  # peft draws from the global generator
            torch.manual_seed(seed)
            return get_peft_model(classifier, config)
    except ValueError as error:
        raise RewardError(f"LoRA: targets={settings.targets!r} of {type(classifier).__name__}: {error}") from error


@contextmanager
def _without_old_names() -> Iterator[None]:
    """Leave out the warning that peft asks transformers for a property by the name it had before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def load_lora(classifier: Any, folder: Path) -> PeftModel:
    """Put a saved adapter into a classifier, ready to be trained on.

    Raises:
        RewardError: The adapter does not fit.
    """
    try:
        with _without_old_names():
            return PeftModel.from_pretrained(classifier, str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RewardError(f"the adapter in {folder} does not fit {type(classifier).__name__}: {error}") from error


def save_lora(network: Any, folder: Path) -> None:
    """Write the adapter, its head included.

    Raises:
        RewardError: There is none.
    """
    if not isinstance(network, PeftModel):
        raise RewardError(f"{type(network).__name__} has no LoRA; save it whole, with save_pretrained")
    # The embedding never trains; where it grew, by the row of padding, loading makes it grow again.
    network.save_pretrained(str(folder), save_embedding_layers=False)


def has_lora(network: Any) -> bool:
    """Return whether LoRA was put into a classifier."""
    return isinstance(network, PeftModel)


def without_lora(network: Any) -> Any:
    """Return the classifier itself; the LoRA in it, if there is any, goes on computing."""
    return network.get_base_model() if isinstance(network, PeftModel) else network


@torch.no_grad()
def plain_state(network: Any) -> dict[str, Tensor]:
    """Return the weights of the plain classifier, LoRA merged in, W + alpha / rank B A; the network is not touched."""
    classifier = without_lora(network)
    state = classifier.state_dict()
    if not isinstance(network, PeftModel):
        return state
    layers: list[tuple[str, Any]] = [item for item in classifier.named_modules() if isinstance(item[1], LoraLayer)]
    for name, layer in layers:
        weight = state[f"{name}.base_layer.weight"]
        # In float32, in which a small update of a bfloat16 weight is not lost before it is added.
        state[f"{name}.base_layer.weight"] = (weight.float() + layer.get_delta_weight(_NAME).float()).to(weight)
    kept = {}
    for name, value in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        kept[name.replace(".base_layer.", ".").replace(f".modules_to_save.{_NAME}.", ".")] = value
    return kept
