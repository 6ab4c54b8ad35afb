"""Which of the two kinds of reward model a folder holds, read from its config alone."""

import json
from pathlib import Path
from typing import Literal

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.language_lora import ADAPTER_FILE

ModelKind = Literal["language", "image_text"]
ACCEPTED = "a language reward model (a sequence classifier or its adapter) and an image-text one (a CLIP) are accepted"


def model_kind(source: str) -> ModelKind:
    """Tell what a folder in transformers' format, or a hub repository in the cache, holds.

    Raises:
        RewardError: It is nowhere, or holds something else.
    """
    if (Path(source) / ADAPTER_FILE).is_file():
        return "language"
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise RewardError(f"{source} has no config.json; give a model's own folder, such as outputs/<run>/model")
    path = WeightsFolder(source).require() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, architectures = str(config.get("model_type")), tuple(config.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RewardError(f"{path} cannot be read: {error}; {ACCEPTED}") from error
    if kind == "clip":
        return "image_text"
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return "language"
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "language"
    name = ", ".join(map(str, architectures)) or kind
    raise RewardError(f"{source} holds {name}, which is no reward model that can be evaluated: {ACCEPTED}")
