"""Checkpoints in open_clip's layout: numbers of open_clip itself, published sizes, and what a wrong file says."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from tests.scorers.tiny_clip import images, tiny_model, to_open_clip
from tests.shared import SHARED, golden, requires_shared
from tiltflow.errors import RewardError
from tiltflow.scorers.open_clip import convert_open_clip, load_open_clip, open_clip_config

TIGHT = 3e-6


def golden_clip() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights and the other tensors of the tiny open_clip network."""
    _, tensors = golden("scorers/clip_tiny")
    state = {name.removeprefix("state_dict/"): t for name, t in tensors.items() if name.startswith("state_dict/")}
    return state, tensors


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((SHARED / "data" / "manifests" / name).read_text())["keys"]
    return {key: tuple(shape) for key, (shape, _) in keys.items()}


def meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@requires_shared
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_every_output_of_open_clip(activation: Any) -> None:
    state, tensors = golden_clip()
    model = load_open_clip(state, hidden_act=activation, vision_head_width=16, text_head_width=16)
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=tensors["in/pixels"]).pooler_output)
        text = model.text_projection(model.text_model(input_ids=tensors["in/token_ids"]).pooler_output)
    unit_image, unit_text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    found = {
        "image_embed_unnormalised": (image, 2e-5),
        "text_embed_unnormalised": (text, 2e-5),
        "image_features": (unit_image, TIGHT),
        "text_features": (unit_text, TIGHT),
        "cosine_matrix": (unit_image @ unit_text.T, TIGHT),
        "hps_score": ((unit_image * unit_text).sum(dim=-1), TIGHT),
        "logit_scale_exp": (model.logit_scale.detach().exp().view(1), TIGHT),
    }
    assert {f"out/{activation}/{name}" for name in found} == {
        name for name in tensors if name.startswith(f"out/{activation}/")
    }
    for name, (value, tolerance) in found.items():
        torch.testing.assert_close(value, tensors[f"out/{activation}/{name}"], atol=tolerance, rtol=0, msg=name)


@requires_shared
def test_the_activation_matters() -> None:
    _, tensors = golden_clip()
    difference = tensors["out/gelu/image_features"] - tensors["out/quick_gelu/image_features"]
    assert difference.abs().max() > 100 * TIGHT


@requires_shared
@pytest.mark.parametrize(
    ("source", "target", "heads", "activation"),
    [
        ("hpsv2_open_clip_vit_h_14.json", "pickscore_v1_hf_clip_vit_h_14.json", (16, 16), "gelu"),
        ("open_clip_vit_l_14.json", "openai_hf_clip_vit_l_14.json", (16, 12), "quick_gelu"),
    ],
)
def test_published_layouts_become_exactly_transformers_layouts(
    source: str, target: str, heads: tuple[int, int], activation: Any
) -> None:
    state, expected = meta(manifest(source)), manifest(target)
    converted = {name: tuple(value.shape) for name, value in convert_open_clip(state).items()}
    assert converted == expected
    config = open_clip_config(state, hidden_act=activation)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == heads
    assert config.vision_config.hidden_act == config.text_config.hidden_act == activation
    assert (config.vision_config.image_size, config.text_config.eos_token_id) == (224, 49407)
    with torch.device("meta"):
        model = CLIPModel(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize("head_width", [16, 64])
def test_a_converted_model_is_the_model_it_was_made_from(head_width: int) -> None:
    original = tiny_model(hidden_act="quick_gelu", head_width=head_width)
    model = load_open_clip(
        to_open_clip(original),
        hidden_act="quick_gelu",
        vision_head_width=head_width,
        text_head_width=head_width,
    )
    ids = torch.tensor([[58, 3, 7, 59, 59], [58, 30, 59, 59, 59]])
    pixels = images(2, height=32, width=32)
    with torch.no_grad():
        found, expected = model(input_ids=ids, pixel_values=pixels), original(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, atol=1e-4, rtol=0)
    assert not model.training
    assert model.config.text_config.num_hidden_layers == 2
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in to_open_clip(tiny_model()).items()}
    model = load_open_clip(state, hidden_act="gelu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual_projection.weight, state["visual.proj"].float().T)


def test_the_prefix_of_distributed_training_and_openai_s_sizes_are_dropped() -> None:
    state = to_open_clip(tiny_model())
    wrapped = {f"module.{name}": value for name, value in state.items()}
    wrapped["module.input_resolution"] = wrapped["module.context_length"] = torch.tensor(224)
    model = load_open_clip(wrapped, hidden_act="gelu")
    assert torch.equal(model.text_projection.weight, state["text_projection"].T)


CHANGES = [
    ("visual.proj", None, "HPS.pt is no CLIP in open_clip's layout: missing visual.proj"),
    ("transformer.resblocks.1.ln_1.bias", None, "missing transformer.resblocks.1.ln_1.bias"),
    ("transformer.resblocks.0.attn.in_proj_weight", None, "missing transformer.resblocks.0.attn.in_proj_weight"),
    ("visual.head.weight", torch.zeros(1), "unexpected visual.head.weight"),
    ("transformer.resblocks.5.ln_1.bias", torch.zeros(32), "missing transformer.resblocks.2"),
    ("visual.conv1.weight", None, "HPS.pt: visual.conv1.weight is missing; it must be a CLIP with a ViT"),
    ("visual.conv1.weight", torch.zeros(32, 3), r"visual.conv1.weight has the shape \[32, 3\], not 4 dimensions"),
    ("visual.positional_embedding", torch.zeros(13, 32), "visual.positional_embedding has 12 patches, which is no squ"),
    ("ln_final.bias", torch.zeros(7), r"text_model.final_layer_norm.bias is \[7\] instead of \[64\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused(name: str, value: Tensor | None, message: str) -> None:
    state = to_open_clip(tiny_model())
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(RewardError, match=message):
        load_open_clip(state, hidden_act="gelu", source="HPS.pt")


def test_a_head_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RewardError, match="vision tower's width 64 is no multiple of the head width 48; pass the head"):
        load_open_clip(to_open_clip(tiny_model()), hidden_act="gelu", vision_head_width=48)
