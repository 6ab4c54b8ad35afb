"""Tiny random checkpoints of what GenEval's detector is made of, in the layouts of the published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig

from tiltflow.scorers.mask2former import Mask2FormerNetwork


def tiny_mask2former(**changes: Any) -> Mask2FormerNetwork:
    """Return a random network of the real class, 80 classes and 20 queries."""
    torch.manual_seed(0)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48}
    sizes |= {"dim_feedforward": 64, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4}
    backbone = SwinConfig(
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 3, 6],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=backbone, **(sizes | {"num_queries": 20, "num_labels": 80} | changes))
    return Mask2FormerNetwork(config).eval()


def save_tiny_clip(folder: Path, *, drop: str | None = None) -> Path:
    """Write a random CLIP of 32 pixels with a tokenizer of letters; without one weight, if asked."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_act": "quick_gelu"}
    text = {**sizes, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if drop is not None:
        state = load_file(folder / "model.safetensors")
        save_file(
            {name: value for name, value in state.items() if name != drop},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    return folder
