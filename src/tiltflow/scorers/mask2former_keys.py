"""mmdet's Mask2Former checkpoints in the names, layouts and sizes of transformers.

The published file exists twice with the same values: in mmdet 2's names (`attentions.0`, `ffns.0`) and in mmdet 3's
(`self_attn`, `cross_attn`, `ffn`). Both become transformers' names by the table below. Three things change beyond
names: joint query-key-value weights are split, patch merging lists its four neighbours in another order, and what
carries no weights is left out by name. Anything unknown keeps its name, so that strict loading refuses it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, SwinConfig

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import read_weights

POINTS: Final = 4  # per head and level of the deformable attention, fixed in transformers
LEVELS: Final = 3  # of the pixel decoder, fixed in transformers

_SWIN: Final = "model.pixel_level_module.encoder"
_PIXEL: Final = "model.pixel_level_module.decoder"
_QUERY: Final = "model.transformer_module"
_BLOCK: Final = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
_ENCODER: Final = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"
_DECODER: Final = r"panoptic_head\.transformer_decoder\.layers\.(\d+)"

# Names of mmdet 2 -> names of mmdet 3.
_FROM_VERSION_2: Final = (
    (rf"({_ENCODER})\.attentions\.0\.", r"\1.self_attn."),
    (rf"({_DECODER})\.attentions\.0\.", r"\1.cross_attn."),
    (rf"({_DECODER})\.attentions\.1\.", r"\1.self_attn."),
    (rf"({_ENCODER}|{_DECODER})\.ffns\.0\.", r"\1.ffn."),
)
# Names of mmdet 3 -> names of transformers; {} stands for each of q, k and v.
_RENAMES: Final = (
    (r"backbone\.patch_embed\.projection\.", f"{_SWIN}.swin.embeddings.patch_embeddings.projection."),
    (r"backbone\.patch_embed\.norm\.", f"{_SWIN}.swin.embeddings.norm."),
    (rf"{_BLOCK}\.norm1\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.layernorm_before."),
    (rf"{_BLOCK}\.norm2\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.layernorm_after."),
    (
        rf"{_BLOCK}\.attn\.w_msa\.relative_position_bias_table",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.attention.relative_position_bias.relative_position_bias_table",
    ),
    (rf"{_BLOCK}\.attn\.w_msa\.qkv\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.attention.{{}}_proj."),
    (rf"{_BLOCK}\.attn\.w_msa\.proj\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.attention.o_proj."),
    (rf"{_BLOCK}\.ffn\.layers\.0\.0\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.mlp.fc1."),
    (rf"{_BLOCK}\.ffn\.layers\.1\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.mlp.fc2."),
    (r"backbone\.stages\.(\d+)\.downsample\.", rf"{_SWIN}.swin.encoder.layers.\1.downsample."),
    *((rf"backbone\.norm{i}\.", f"{_SWIN}.hidden_states_norms.stage{i + 1}.") for i in range(4)),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv\.", rf"{_PIXEL}.input_projections.\1.0."),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn\.", rf"{_PIXEL}.input_projections.\1.1."),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", f"{_PIXEL}.adapter_1.0."),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", f"{_PIXEL}.adapter_1.1."),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", f"{_PIXEL}.layer_1.0."),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", f"{_PIXEL}.layer_1.1."),
    (r"panoptic_head\.pixel_decoder\.mask_feature\.", f"{_PIXEL}.mask_projection."),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", f"{_PIXEL}.level_embed"),
    (rf"{_ENCODER}\.self_attn\.", rf"{_PIXEL}.encoder.layers.\1.self_attn."),
    (rf"{_ENCODER}\.ffn\.layers\.0\.0\.", rf"{_PIXEL}.encoder.layers.\1.fc1."),
    (rf"{_ENCODER}\.ffn\.layers\.1\.", rf"{_PIXEL}.encoder.layers.\1.fc2."),
    (rf"{_ENCODER}\.norms\.0\.", rf"{_PIXEL}.encoder.layers.\1.self_attn_layer_norm."),
    (rf"{_ENCODER}\.norms\.1\.", rf"{_PIXEL}.encoder.layers.\1.final_layer_norm."),
    (rf"{_DECODER}\.cross_attn\.attn\.", rf"{_QUERY}.decoder.layers.\1.cross_attn."),
    (rf"{_DECODER}\.self_attn\.attn\.in_proj_", rf"{_QUERY}.decoder.layers.\1.self_attn.{{}}_proj."),
    (rf"{_DECODER}\.self_attn\.attn\.out_proj\.", rf"{_QUERY}.decoder.layers.\1.self_attn.out_proj."),
    (rf"{_DECODER}\.ffn\.layers\.0\.0\.", rf"{_QUERY}.decoder.layers.\1.fc1."),
    (rf"{_DECODER}\.ffn\.layers\.1\.", rf"{_QUERY}.decoder.layers.\1.fc2."),
    (rf"{_DECODER}\.norms\.0\.", rf"{_QUERY}.decoder.layers.\1.cross_attn_layer_norm."),
    (rf"{_DECODER}\.norms\.1\.", rf"{_QUERY}.decoder.layers.\1.self_attn_layer_norm."),
    (rf"{_DECODER}\.norms\.2\.", rf"{_QUERY}.decoder.layers.\1.final_layer_norm."),
    (r"panoptic_head\.transformer_decoder\.post_norm\.", f"{_QUERY}.decoder.layernorm."),
    (r"panoptic_head\.query_embed\.", f"{_QUERY}.queries_embedder."),
    (r"panoptic_head\.query_feat\.", f"{_QUERY}.queries_features."),
    (r"panoptic_head\.level_embed\.", f"{_QUERY}.level_embed."),
    (r"panoptic_head\.cls_embed\.", "class_predictor."),
    *(
        (rf"panoptic_head\.mask_embed\.{2 * i}\.", f"{_QUERY}.decoder.mask_predictor.mask_embedder.{i}.0.")
        for i in range(3)
    ),
)
# Parts of mmdet's model that hold no weights of the network: preprocessing constants and the training losses.
_WEIGHTLESS: Final = (
    "data_preprocessor.",
    "panoptic_fusion_head.",
    "panoptic_head.loss_cls.",
    "panoptic_head.loss_mask.",
    "panoptic_head.loss_dice.",
)
_POSITION_INDEX: Final = ".attn.w_msa.relative_position_index"  # which entry of the bias table belongs to two pixels
# transformers' backbone owns a final norm that its feature maps never pass through.
_UNUSED_NORM: Final = f"{_SWIN}.swin.layernorm"

# What training scripts pickle beside the weights (log buffers, numpy numbers); none of it is of use here.
_PICKLED_BESIDE: Final = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{name}DType" for name in ("Bool", "Int32", "Int64", "Float32", "Float64")),
)


class _Placeholder:
    """Stands for a pickled object that nobody needs, whatever it is made or filled with."""

    def __init__(self, *content: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_mmdet(path: Path) -> dict[str, Tensor]:
    """Read an mmdet `.pth` file to the CPU under its own names; nothing in it is run.

    Raises:
        RewardError: The file cannot be read, or holds other objects than weights and the usual training records.
    """
    try:
        return read_weights(path)
    except RewardError:
        # Files of whole training runs keep records beside the weights: read again with placeholders for those.
        names: list[Any] = [(_Placeholder, name) for name in _PICKLED_BESIDE]
        with torch.serialization.safe_globals(names):
            return read_weights(path)


def convert_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an mmdet 2 or 3 file under transformers' names.

    Args:
        state: Weights under mmdet's names; a name that is not mmdet's is kept as it is.

    Raises:
        RewardError: The file numbers the relative positions of a window differently than Swin does.
    """
    converted: dict[str, Tensor] = {}
    for name, value in _version_3(state).items():
        if name.endswith(_POSITION_INDEX):
            _check_position_index(name, value)
        elif not name.startswith(_WEIGHTLESS):
            converted.update(_convert(name, value))
        if name == "backbone.norm3.weight":
            converted[f"{_UNUSED_NORM}.weight"] = torch.ones_like(value)
            converted[f"{_UNUSED_NORM}.bias"] = torch.zeros_like(value)
    return converted


def mmdet_config(state: Mapping[str, Tensor], *, source: str) -> Mask2FormerConfig:
    """Return the sizes of the network that an mmdet file of Mask2Former with Swin belongs to, read from its shapes.

    Args:
        state: Weights under mmdet's names, of version 2 or 3.
        source: What messages call the file.

    Raises:
        RewardError: It is no such file.
    """
    state = _version_3(state)
    head, pixel = "panoptic_head", "panoptic_head.pixel_decoder"

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise RewardError(f"{source} is no mmdet checkpoint of Mask2Former with a Swin backbone: it has no {name}")
        return state[name].shape

    bias_tables = [shape(f"backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table") for i in range(4)]
    embed, width = shape("backbone.patch_embed.projection.weight")[0], shape(f"{head}.query_embed.weight")[1]
    offsets = shape(f"{pixel}.encoder.layers.0.self_attn.sampling_offsets.bias")[0]
    backbone = SwinConfig.from_dict(
        {
            "embed_dim": embed,
            "depths": [_count(state, rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(4)],
            "num_heads": [int(table[1]) for table in bias_tables],
            "window_size": (int(bias_tables[0][0] ** 0.5) + 1) // 2,
            "mlp_ratio": shape("backbone.stages.0.blocks.0.ffn.layers.0.0.bias")[0] / embed,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=shape(f"{pixel}.mask_feature.weight")[1],
        mask_feature_size=shape(f"{pixel}.mask_feature.weight")[0],
        hidden_dim=width,
        encoder_feedforward_dim=shape(f"{pixel}.encoder.layers.0.ffn.layers.0.0.bias")[0],
        dim_feedforward=shape(f"{head}.transformer_decoder.layers.0.ffn.layers.0.0.bias")[0],
        encoder_layers=_count(state, _ENCODER),
        decoder_layers=_count(state, _DECODER) + 1,  # transformers counts the prediction before the first layer
        num_attention_heads=offsets // (LEVELS * POINTS * 2),
        num_queries=shape(f"{head}.query_embed.weight")[0],
    )
    config.num_labels = shape(f"{head}.cls_embed.bias")[0] - 1  # without the background
    return config


def _version_3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of mmdet 3."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _FROM_VERSION_2:
            name = re.sub(f"^{pattern}", replacement, name)
        renamed[name] = value
    return renamed


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many different numbers stand at a place of the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _convert(name: str, value: Tensor) -> dict[str, Tensor]:
    for pattern, replacement in _RENAMES:
        renamed, matched = re.subn(f"^{pattern}", replacement, name)
        if matched and "{}" in renamed:
            return dict(zip((renamed.format(part) for part in "qkv"), value.chunk(3), strict=True))
        if matched:
            return {renamed: _merge_order(value) if ".downsample." in renamed else value}
    return {name: value}


def _merge_order(value: Tensor) -> Tensor:
    """Reorder the inputs of patch merging, `[..., 4 C]`.

    mmdet lists the four neighbours of each channel together, row by row; transformers lists all channels of each
    neighbour together, column by column.
    """
    if value.shape[-1] == 0 or value.shape[-1] % 4:
        return value
    split = value.unflatten(-1, (-1, 2, 2))  # [..., C, row, column]
    return split.movedim(-3, -1).transpose(-3, -2).flatten(-3)  # [..., column, row, C]


def _check_position_index(name: str, value: Tensor) -> None:
    """Compare with Swin's numbering, which transformers computes for itself."""
    side = int(value.shape[0] ** 0.5)
    if value.is_meta:
        return
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # [side^2, 2]
    apart = places[:, None] - places[None] + side - 1  # query minus key, from 0
    if not torch.equal(value.long(), apart[..., 0] * (2 * side - 1) + apart[..., 1]):
        raise RewardError(f"{name} numbers the positions of a window differently than Swin: not a checkpoint of mmdet")
