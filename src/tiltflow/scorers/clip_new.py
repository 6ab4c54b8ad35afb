"""CLIP networks made from nothing, and any of them written in transformers' format."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field, model_validator
from transformers import CLIPConfig, CLIPModel

from tiltflow.scorers.clip_backbone import ClipBackbone
from tiltflow.scorers.clip_tokenizer import build_tokenizer
from tiltflow.scorers.preprocess import CLIP_MEAN, CLIP_STD
from tiltflow.types import Config

INITIAL_LOGIT_SCALE: Final = math.log(1 / 0.07)  # of the logarithm that is learnt (Radford et al. 2021)
_BICUBIC: Final = 3  # as PIL numbers it


class ClipSizes(Config):
    """Sizes of a CLIP made from nothing; the defaults give 1.3 M parameters for the drawn scenes."""

    image_size: int = Field(default=64, ge=1)  # side of the square that is read, pixels
    patch_size: int = Field(default=8, ge=1)
    vision_width: int = Field(default=128, ge=1)
    vision_layers: int = Field(default=4, ge=1)
    text_width: int = Field(default=128, ge=1)
    text_layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    text_tokens: int = Field(default=16, ge=3)
    embedding: int = Field(default=128, ge=1)  # of both projections

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ClipSizes":
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"heads={self.heads} must divide {name}={getattr(self, name)}")
        return self


def new_clip(sizes: ClipSizes, captions: Sequence[str], *, seed: int) -> ClipBackbone:
    """Make a CLIP with random weights and a tokenizer in which the common words of `captions` are one token each.

    Args:
        sizes: Its sizes.
        captions: What the tokenizer learns its tokens from, at most 2,000; rare words are pieces, others letters.
        seed: Seeds the weights.
    """
    tokenizer = build_tokenizer(captions, max_length=sizes.text_tokens)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.text_tokens,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.heads,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=sizes.embedding,
        logit_scale_init_value=INITIAL_LOGIT_SCALE,
    )
    with torch.random.fork_rng(devices=[]):  # the class draws its weights from the global generator
        torch.manual_seed(seed)
        return ClipBackbone(CLIPModel(config), tokenizer)


def save_clip(backbone: ClipBackbone, folder: Path) -> None:
    """Write a folder that `load_clip_folder`, and transformers' CLIPModel and CLIPProcessor, can load."""
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    size = backbone.image_size
    preprocessing: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
