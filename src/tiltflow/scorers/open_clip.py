"""CLIP checkpoints in open_clip's layout, converted strictly to transformers' CLIPModel.

The two hold the same numbers under other names: open_clip keeps query, key and value of an attention layer in one
matrix, and stores both projections input by output, where a Linear stores output by input.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Final, Literal

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import load_strictly

HiddenAct = Literal["gelu", "quick_gelu"]

# Head width of the vision tower by its width: ViT-H-14, ViT-g-14 and ViT-bigG-14. Every other CLIP has heads of 64.
VISION_HEAD_WIDTHS: Final[Mapping[int, int]] = {1280: 80, 1408: 88, 1664: 104}
HEAD_WIDTH: Final = 64

# Sizes that OpenAI's own files carry beside the weights.
NOT_WEIGHTS: Final = ("input_resolution", "context_length", "vocab_size")

# transformers' name -> open_clip's; those of _TRANSPOSED are stored the other way round.
_DIRECT: Final = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelt so in transformers
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_TRANSPOSED: Final = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_TOWERS: Final = {"text_model": "transformer", "vision_model": "visual.transformer"}
_BLOCK: Final = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def load_open_clip(
    state: Mapping[str, Tensor],
    *,
    hidden_act: HiddenAct,
    vision_head_width: int | None = None,
    text_head_width: int = HEAD_WIDTH,
    source: str = "the checkpoint",
) -> CLIPModel:
    """Build a CLIPModel in float32 on the CPU from weights in open_clip's layout.

    Args:
        state: Names to tensors of any float dtype.
        hidden_act: "quick_gelu" for OpenAI's weights and their descendants, "gelu" (exact) for LAION's and HPSv2's.
            The file does not say it, and the architecture's name does not either.
        vision_head_width: Channels per attention head of the vision tower; None takes it from the tower's width.
        text_head_width: The same of the text tower.
        source: Named in messages.

    Raises:
        RewardError: A weight is missing, unexpected or of an impossible shape.
    """
    state = _clean(state)
    config = open_clip_config(
        state,
        hidden_act=hidden_act,
        vision_head_width=vision_head_width,
        text_head_width=text_head_width,
        source=source,
    )
    converted = convert_open_clip(state, source=source)
    # Built without storage: drawing a billion random weights only to overwrite them takes half a minute.
    with torch.device("meta"):
        model = CLIPModel(config)
    model = model.to_empty(device="cpu")
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        positions = embeddings.position_ids  # the only values of a CLIPModel that no checkpoint holds
        positions.copy_(torch.arange(positions.shape[-1]).expand_as(positions))
    load_strictly(model, converted, source=source)
    return model.eval()


def open_clip_config(
    state: Mapping[str, Tensor],
    *,
    hidden_act: HiddenAct,
    vision_head_width: int | None = None,
    text_head_width: int = HEAD_WIDTH,
    source: str = "the checkpoint",
) -> CLIPConfig:
    """Read a model's sizes off the shapes of its weights.

    The end-of-text token is the last of the vocabulary, and text is pooled at its first occurrence; LayerNorm's epsilon
    is 1e-5 in both towers.

    Raises:
        RewardError: A weight is missing, or its shape fits no CLIP vision transformer.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise RewardError(f"{source}: {name} is missing; it must be a CLIP with a ViT in open_clip's layout")
        found = state[name].shape
        if len(found) != dimensions:
            raise RewardError(f"{source}: {name} has the shape {list(found)}, not {dimensions} dimensions")
        return found

    vocabulary, text_width = shape("token_embedding.weight", 2)
    vision_width, channels, patch, _ = shape("visual.conv1.weight", 4)
    patches = shape("visual.positional_embedding", 2)[0] - 1  # one place is the class token's
    if isqrt(max(patches, 0)) ** 2 != patches:
        raise RewardError(f"{source}: visual.positional_embedding has {patches} patches, which is no square")
    width = vision_head_width or VISION_HEAD_WIDTHS.get(vision_width, HEAD_WIDTH)
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _layers(state, "transformer"),
        "num_attention_heads": _heads(text_width, text_head_width, tower="text", source=source),
        "max_position_embeddings": shape("positional_embedding", 2)[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _layers(state, "visual.transformer"),
        "num_attention_heads": _heads(vision_width, width, tower="vision", source=source),
        "num_channels": channels,
        "image_size": isqrt(patches) * patch,
        "patch_size": patch,
    }
    projection = shape("text_projection", 2)[1]
    common = {"hidden_act": hidden_act, "layer_norm_eps": 1e-5, "projection_dim": projection}
    return CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=projection)


def convert_open_clip(state: Mapping[str, Tensor], *, source: str = "the checkpoint") -> dict[str, Tensor]:
    """Give weights in open_clip's layout the names and forms of transformers' CLIPModel.

    Raises:
        RewardError: A weight is missing or unexpected, by its name in the file.
    """
    rest = _clean(state)
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in rest:
            missing.append(name)
            return torch.empty(0, 0, device="meta")
        return rest.pop(name)

    converted = {new: take(old) for new, old in _DIRECT.items()}
    converted |= {new: take(old).T for new, old in _TRANSPOSED.items()}
    for new_tower, old_tower in _TOWERS.items():
        for layer in range(_layers(rest, old_tower)):
            new, old = f"{new_tower}.encoder.layers.{layer}", f"{old_tower}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                thirds = take(f"{old}.attn.in_proj_{kind}").chunk(3)
                for name, part in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=False):  # missing: no thirds
                    converted[f"{new}.self_attn.{name}.{kind}"] = part
                converted |= {f"{new}.{n}.{kind}": take(f"{old}.{o}.{kind}") for n, o in _BLOCK.items()}
    problems = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in rest]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RewardError(f"{source} is no CLIP in open_clip's layout: {'; '.join(problems[:3])}{more}")
    return converted


def _clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefix that distributed training adds, and the sizes that are no weights."""
    prefix = "module." if state and all(name.startswith("module.") for name in state) else ""
    named = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in named.items() if name not in NOT_WEIGHTS}


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    """Count the blocks of a tower by the highest index; a gap among them shows as missing weights."""
    pattern = re.compile(re.escape(tower) + r"\.resblocks\.(\d+)\.")
    found = [int(match[1]) for match in map(pattern.match, state) if match]
    return max(found, default=-1) + 1


def _heads(width: int, head_width: int, *, tower: str, source: str) -> int:
    if head_width < 1 or width % head_width:
        raise RewardError(
            f"{source}: the {tower} tower's width {width} is no multiple of the head width {head_width}; pass the head "
            "width of this model"
        )
    return width // head_width
