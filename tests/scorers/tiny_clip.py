"""Small random CLIPs of the real classes with a small tokenizer of the real class: nothing is downloaded."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tiltflow.scorers.clip_backbone import ClipBackbone

WIDTH = 32  # of the embeddings
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]


def vocabulary() -> dict[str, int]:
    """Letters within and at the end of words, a few merged pieces, and the two marks at the end as CLIP has them."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in MERGES)]
    return {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def save_tokenizer(folder: Path) -> Path:
    """Write vocab.json and merges.txt, the files that CLIP was published with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES)]) + "\n")
    return folder


def tiny_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=MERGES)


def tiny_model(
    *, seed: int = 1, hidden_act: str = "gelu", image_size: int = 32, width: int = WIDTH, head_width: int = 64
) -> CLIPModel:
    """Return a random CLIP whose embeddings depend on every pixel and every token.

    One head of 64, so that its sizes can be read off its weights as those of a large CLIP can.
    """
    size = len(vocabulary())
    text = {
        "vocab_size": size,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": 0,
        "max_position_embeddings": 12,
    }
    vision = {"image_size": image_size, "patch_size": 8}
    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 64 // head_width,
        "projection_dim": width,
        "hidden_act": hidden_act,
    }
    config = CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=width)
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # the initial weights are so small that all embeddings are nearly equal
                weight.copy_(torch.randn_like(weight) * (0.3 if "embed" in name else weight.shape[-1] ** -0.5))
        model.logit_scale.fill_(4.6052)
    return model


def tiny_backbone(**options: int | str) -> ClipBackbone:
    return ClipBackbone(tiny_model(**options), tiny_tokenizer())  # pyright: ignore[reportArgumentType]


def save_clip(folder: Path, **options: int | str) -> Path:
    """Write a tiny CLIP with its tokenizer in transformers' format."""
    tiny_model(**options).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return save_tokenizer(folder)


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """Rename a CLIPModel's weights to open_clip's layout, written independently of the package's converter."""
    state, result = model.state_dict(), {}
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "logit_scale": "logit_scale",
    }
    pieces = (
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("layer_norm", "ln_"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    for name, value in state.items():
        if name.endswith("_projection.weight"):
            result["visual.proj" if name.startswith("visual") else "text_projection"] = value.T.contiguous()
            continue
        if name.endswith((".k_proj.weight", ".k_proj.bias", ".v_proj.weight", ".v_proj.bias")):
            continue
        new = names.get(name, name)
        for old_piece, new_piece in pieces:
            new = new.replace(old_piece, new_piece)
        if ".q_proj." in name:
            thirds = [state[name.replace("q_proj", letter)] for letter in ("q_proj", "k_proj", "v_proj")]
            value, new = torch.cat(thirds), new.replace("q_proj.", "in_proj_")
        result[new] = value.clone()
    return result


def images(count: int, *, height: int = 40, width: int = 48, seed: int = 0) -> Tensor:
    """Return random images `[count, 3, height, width]` in [0, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
