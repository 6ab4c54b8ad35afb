"""The published layout of ImageReward's weights: the sizes it holds, and its names in the transformers BLIP classes."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from tiltflow.errors import RewardError

# What the file holds and the score does not read: the two projections of BLIP's contrastive pretraining, and a buffer
# of the numbers 0, 1, 2, ...
IGNORED: Final = (
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)

# Published name -> name in `ImageRewardScorer`; tried in this order. The text encoder's own names are those of the
# original BLIP, which transformers kept.
RENAMES: Final = (
    (r"blip\.visual_encoder\.cls_token", r"vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", r"vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(\w+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(\w+)", r"vision.post_layernorm.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"vision.encoder.layers.\1.mlp.\2.\3"),
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"mlp\.layers\.(\d+)\.(\w+)", r"head.\1.\2"),
)
HEAD: Final = (0, 2, 4, 6, 7)  # where the head's linear layers stand; dropouts stand between them


@dataclass(frozen=True)
class ImageRewardSizes:
    """Sizes of the network; the numbers of attention heads leave no trace in the weights and must be known.

    Example: the published file has `vision_width=1024`, `vision_layers=24`, `text_width=768`, `text_layers=12`.
    """

    image_size: int  # pixels
    patch_size: int  # pixels
    vision_width: int
    vision_layers: int
    vision_inner: int  # width inside the feed-forward blocks
    vision_heads: int
    text_width: int
    text_layers: int
    text_inner: int
    text_heads: int
    vocabulary: int  # rows of the token table: those of the tokenizer
    positions: int  # rows of the position table
    head: tuple[int, ...]  # widths of the head's linear layers, its input first


def image_reward_sizes(
    shapes: Mapping[str, tuple[int, ...]], *, vision_heads: int, text_heads: int
) -> ImageRewardSizes:
    """Read the network's sizes off the shapes of the weights.

    Args:
        shapes: Published name -> shape.
        vision_heads: Attention heads of the vision transformer.
        text_heads: Attention heads of the text encoder.

    Raises:
        RewardError: A weight that tells a size is missing, or a width is no multiple of its number of heads.
    """
    try:
        patches = shapes["blip.visual_encoder.pos_embed"][1] - 1
        width, _, patch, _ = shapes["blip.visual_encoder.patch_embed.proj.weight"]
        vision_inner = shapes["blip.visual_encoder.blocks.0.mlp.fc1.weight"][0]
        vocabulary, text_width = shapes["blip.text_encoder.embeddings.word_embeddings.weight"]
        positions = shapes["blip.text_encoder.embeddings.position_embeddings.weight"][0]
        text_inner = shapes["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"][0]
        head = [shapes[f"mlp.layers.{index}.weight"] for index in HEAD]
    except KeyError as error:
        raise RewardError(f"these are no weights of ImageReward: {error.args[0]} is missing") from error
    for name, size, heads in (("vision", width, vision_heads), ("text", text_width, text_heads)):
        if size % heads:
            raise RewardError(f"{name}_heads={heads} does not divide the {name} width {size}; give the trained number")
    return ImageRewardSizes(
        image_size=patch * math.isqrt(patches),
        patch_size=patch,
        vision_width=width,
        vision_layers=_count(shapes, "blip.visual_encoder.blocks"),
        vision_inner=vision_inner,
        vision_heads=vision_heads,
        text_width=text_width,
        text_layers=_count(shapes, "blip.text_encoder.encoder.layer"),
        text_inner=text_inner,
        text_heads=text_heads,
        vocabulary=vocabulary,
        positions=positions,
        head=(head[0][1], *(shape[0] for shape in head)),
    )


def convert_image_reward(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published weights under the names of `ImageRewardScorer`, without those that the score does not read.

    A name that is not part of the layout stays as it is, so that strict loading reports it.
    """
    return {_convert(name): value for name, value in state.items() if name not in IGNORED}


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the `module.` that distributed training puts before every name."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _convert(name: str) -> str:
    for pattern, replacement in RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def _count(names: Iterable[str], prefix: str) -> int:
    """Return how many numbered blocks there are."""
    numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names]
    return len({match.group(1) for match in numbers if match})
