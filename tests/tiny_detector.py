"""Tiny random checkpoints of what GenEval's detector is made of, in the layouts of the published ones."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig

from tiltflow.scorers.mask2former import Mask2FormerNetwork

EMBED, DEPTHS, HEADS, WINDOW = 12, (1, 1, 2, 1), (1, 2, 3, 6), 3
WIDTH, ATTENTION_HEADS, PIXEL_FFN, QUERY_FFN, QUERIES = 32, 4, 48, 64, 20
PIXEL_LAYERS, QUERY_LAYERS = 1, 2


def tiny_mask2former(*, classes: int = 80) -> Mask2FormerNetwork:
    """Return a random network of the real class."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=EMBED,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        encoder_feedforward_dim=PIXEL_FFN,
        dim_feedforward=QUERY_FFN,
        encoder_layers=PIXEL_LAYERS,
        decoder_layers=QUERY_LAYERS + 1,
        num_attention_heads=ATTENTION_HEADS,
        num_queries=QUERIES,
        num_labels=classes,
    )
    return Mask2FormerNetwork(config).eval()


def confident(network: Mask2FormerNetwork) -> Mask2FormerNetwork:
    """Make a random network's class probabilities high enough for detections, and different between queries."""
    with torch.no_grad():
        network.class_predictor.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(3))
        network.class_predictor.bias.zero_()
    return network


def mmdet_state(version: int) -> dict[str, Tensor]:
    """Return random weights of the same sizes under the names of mmdet 2 or 3."""
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.patch_embed.projection.weight": (EMBED, 3, 4, 4),
        "backbone.patch_embed.projection.bias": (EMBED,),
    }

    def linear(name: str, outputs: int, inputs: int, *rest: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, *rest)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    norm("backbone.patch_embed.norm", EMBED)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = EMBED * 2**stage
        norm(f"backbone.norm{stage}", width)
        for block in (f"backbone.stages.{stage}.blocks.{index}" for index in range(depth)):
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            shapes[f"{block}.attn.w_msa.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, heads)
            linear(f"{block}.attn.w_msa.qkv", 3 * width, width)
            linear(f"{block}.attn.w_msa.proj", width, width)
            linear(f"{block}.ffn.layers.0.0", 4 * width, width)
            linear(f"{block}.ffn.layers.1", width, 4 * width)
        if stage < 3:
            norm(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            linear(f"backbone.stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
    pixel, head = "panoptic_head.pixel_decoder", "panoptic_head"
    for level in range(3):
        linear(f"{pixel}.input_convs.{level}.conv", WIDTH, EMBED * 2 ** (3 - level), 1, 1)
        norm(f"{pixel}.input_convs.{level}.gn", WIDTH)
    for layer in (f"{pixel}.encoder.layers.{index}" for index in range(PIXEL_LAYERS)):
        linear(f"{layer}.self_attn.sampling_offsets", ATTENTION_HEADS * 24, WIDTH)
        linear(f"{layer}.self_attn.attention_weights", ATTENTION_HEADS * 12, WIDTH)
        linear(f"{layer}.self_attn.value_proj", WIDTH, WIDTH)
        linear(f"{layer}.self_attn.output_proj", WIDTH, WIDTH)
        linear(f"{layer}.ffn.layers.0.0", PIXEL_FFN, WIDTH)
        linear(f"{layer}.ffn.layers.1", WIDTH, PIXEL_FFN)
        norm(f"{layer}.norms.0", WIDTH)
        norm(f"{layer}.norms.1", WIDTH)
    linear(f"{pixel}.lateral_convs.0.conv", WIDTH, EMBED, 1, 1, bias=False)
    norm(f"{pixel}.lateral_convs.0.gn", WIDTH)
    linear(f"{pixel}.output_convs.0.conv", WIDTH, WIDTH, 3, 3, bias=False)
    norm(f"{pixel}.output_convs.0.gn", WIDTH)
    linear(f"{pixel}.mask_feature", WIDTH, WIDTH, 1, 1)
    for layer in (f"{head}.transformer_decoder.layers.{index}" for index in range(QUERY_LAYERS)):
        for attention in (f"{layer}.{kind}.attn" for kind in ("cross_attn", "self_attn")):
            shapes[f"{attention}.in_proj_weight"], shapes[f"{attention}.in_proj_bias"] = (
                (3 * WIDTH, WIDTH),
                (3 * WIDTH,),
            )
            linear(f"{attention}.out_proj", WIDTH, WIDTH)
        linear(f"{layer}.ffn.layers.0.0", QUERY_FFN, WIDTH)
        linear(f"{layer}.ffn.layers.1", WIDTH, QUERY_FFN)
        for index in range(3):
            norm(f"{layer}.norms.{index}", WIDTH)
    norm(f"{head}.transformer_decoder.post_norm", WIDTH)
    for name, rows in (("query_embed", QUERIES), ("query_feat", QUERIES), ("level_embed", 3)):
        shapes[f"{head}.{name}.weight"] = (rows, WIDTH)
    shapes[f"{pixel}.level_encoding.weight"] = (3, WIDTH)
    linear(f"{head}.cls_embed", 81, WIDTH)
    for index in (0, 2, 4):
        linear(f"{head}.mask_embed.{index}", WIDTH, WIDTH)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    side = torch.arange(WINDOW)
    apart = side[:, None] - side[None] + WINDOW - 1  # [W, W]
    index = apart[:, None, :, None] * (2 * WINDOW - 1) + apart[None, :, None, :]  # [W, W, W, W]
    for name in [name for name in state if name.endswith("bias_table")]:
        key = name.replace("relative_position_bias_table", "relative_position_index")
        state[key] = index.reshape(WINDOW**2, WINDOW**2).clone()
    return state if version == 3 else {_version_2(name): value for name, value in state.items()}


def _version_2(name: str) -> str:
    name = re.sub(r"(encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0.", name)
    name = re.sub(r"(transformer_decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.0.", name)
    name = re.sub(r"(transformer_decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.1.", name)
    return re.sub(r"(coder\.layers\.\d+)\.ffn\.", r"\1.ffns.0.", name)


def save_tiny_clip(folder: Path, *, drop: str | None = None) -> Path:
    """Write a random CLIP of 32 pixels with a tokenizer of letters; without one weight, if asked."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
    text = {**sizes, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if drop is not None:
        state = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in state.items() if name != drop}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder
