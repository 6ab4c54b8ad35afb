"""GenEval's colour check against its own code's numbers."""

import gc
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.shared import golden, requires_shared
from tests.tiny_detector import save_tiny_clip
from tiltflow.errors import RewardError
from tiltflow.scorers.clip_loading import load_clip_folder
from tiltflow.scorers.geneval_color import COLORS, TEMPLATES, ColorClassifier, color_crop, load_color_classifier


def golden_clip() -> CLIPModel:
    """Return the golden CLIP of open_clip's layout as transformers' model, with quick GELU."""
    meta, tensors = golden("scorers/clip_tiny")
    state = {name[len("state_dict/") :]: value for name, value in tensors.items() if name.startswith("state_dict/")}
    text, vision = meta["config"]["text_cfg"], meta["config"]["vision_cfg"]
    shared = {"hidden_act": "quick_gelu", "num_hidden_layers": 2, "projection_dim": meta["config"]["embed_dim"]}
    config = CLIPConfig(
        text_config={
            **shared,
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_attention_heads": meta["heads"]["text"],
            "vocab_size": text["vocab_size"],
            "eos_token_id": text["vocab_size"] - 1,
        },
        vision_config={
            **shared,
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_attention_heads": meta["heads"]["vision"],
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
        },
        projection_dim=meta["config"]["embed_dim"],
    )
    model = CLIPModel(config)
    converted = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    norms = {"ln_final": "text_model.final_layer_norm"}
    norms |= {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for i in range(2):
            old, new = f"{prefix}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            norms |= {f"{old}.ln_1": f"{new}.layer_norm1", f"{old}.ln_2": f"{new}.layer_norm2"}
            norms |= {f"{old}.attn.out_proj": f"{new}.self_attn.out_proj"}
            norms |= {f"{old}.mlp.c_fc": f"{new}.mlp.fc1", f"{old}.mlp.c_proj": f"{new}.mlp.fc2"}
            for kind in ("weight", "bias"):
                for part, value in zip("qkv", state[f"{old}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    converted[f"{new}.self_attn.{part}_proj.{kind}"] = value
    converted |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items() for kind in ("weight", "bias")}
    model.load_state_dict(converted, strict=True)
    return model


@requires_shared
def test_golden_colors() -> None:
    meta, tensors = golden("scorers/geneval_color")
    assert tuple(meta["colors"]) == COLORS
    asked: list[str] = []

    def tokenize(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return tensors["in/text_token_ids"].flatten(0, 1)

    classifier = ColorClassifier(golden_clip(), tokenize)
    image, boxes = tensors["in/image_u8"].numpy(), tensors["in/boxes"].tolist()
    masks = tensors["in/masks"].bool().numpy()
    crops = torch.stack([classifier.crop(image, box, mask) for box, mask in zip(boxes, masks, strict=True)])
    torch.testing.assert_close(crops[:, :, ::16, ::16], tensors["out/crops_every16th"], atol=1e-5, rtol=0)
    torch.testing.assert_close(crops[0, :, 112], tensors["out/crop0_row112"], atol=1e-5, rtol=0)
    tolerance = meta["tolerance"]
    torch.testing.assert_close(crops.mean((2, 3)), tensors["out/crops_mean"], atol=tolerance["crops_mean_abs"], rtol=0)
    torch.testing.assert_close(crops.std((2, 3)), tensors["out/crops_std"], atol=tolerance["crops_mean_abs"], rtol=0)
    bare = torch.stack([color_crop(image, box) for box in boxes])
    torch.testing.assert_close(bare[:, :, ::16, ::16], tensors["out/crops_no_mask_every16th"], atol=1e-5, rtol=0)

    labels = [meta["object_name"]] * len(boxes)
    logits = classifier.logits(list(crops), labels)
    torch.testing.assert_close(
        classifier.class_vectors("bench"), tensors["out/classifier"], atol=tolerance["classifier_abs"], rtol=0
    )
    torch.testing.assert_close(logits, tensors["out/logits"], atol=tolerance["logits_abs"], rtol=0)
    assert classifier.colors(list(crops), labels) == meta["expected_colors"]
    assert logits.argmax(1).tolist() == tensors["out/color_index"].tolist()
    first, last = meta["texts_requested_first_and_last_colour"]
    assert asked[:3] == first and asked[-3:] == last
    assert len(asked) == len(COLORS) * len(TEMPLATES), "the texts of one object are encoded once"


def flat(color: tuple[int, int, int], height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), color, dtype=np.uint8)


def test_a_crop_shows_the_object_on_grey() -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 20:30] = True
    crop = color_crop(flat((255, 0, 0)), (10, 10, 40, 30), mask)
    grey = (torch.tensor([153 / 255] * 3) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    assert crop.shape == (3, 224, 224)
    torch.testing.assert_close(crop[:, 100, 5], grey)
    assert crop[0, 100, 112] > 1.9 and crop[1, 100, 112] < -1.7


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (300, 2), (224, 224), (225, 224)])
def test_crops_of_any_shape(height: int, width: int) -> None:
    crop = color_crop(flat((0, 0, 255), 300, 300), (0, 0, width, height), size=32)
    assert crop.shape == (3, 32, 32) and crop.isfinite().all()
    assert (crop == crop[:, :1, :1]).all()


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (5, 9, 9, 5), (0.2, 0, 0.4, 3)])
def test_an_empty_box_is_an_error(box: tuple[float, ...]) -> None:
    with pytest.raises(RewardError, match="is empty; give x1 < x2 and y1 < y2"):
        color_crop(flat((0, 0, 0)), box)


def test_a_classifier_from_a_folder(tmp_path: Path) -> None:
    classifier = load_color_classifier(save_tiny_clip(tmp_path / "clip"))
    crops = [classifier.crop(flat((255, 0, 0)), (0, 0, 30, 30)), classifier.crop(flat((0, 0, 255)), (5, 5, 30, 30))]
    assert not classifier.training and not any(parameter.requires_grad for parameter in classifier.parameters())
    logits = classifier.logits(crops, ["cup", "tv remote"])
    alone = torch.cat(
        [classifier.logits([crop], [label]) for crop, label in zip(crops, ["cup", "tv remote"], strict=True)]
    )
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
    assert not torch.equal(classifier.class_vectors("cup"), classifier.class_vectors("tv remote"))
    torch.testing.assert_close(classifier.class_vectors("cup").norm(dim=0), torch.ones(10))
    assert classifier.colors([], []) == []
    copy = pickle.loads(pickle.dumps(classifier))
    torch.testing.assert_close(copy.logits(crops, ["cup", "dog"]), classifier.logits(crops, ["cup", "dog"]))


def test_the_network_is_shared_with_whoever_loads_it_later(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    classifier = load_color_classifier(folder)
    gc.collect()
    assert load_clip_folder(folder).model is classifier.model


def test_more_crops_than_one_pass_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load_color_classifier(save_tiny_clip(tmp_path / "clip"))
    crops = [classifier.crop(flat((40 * i, 0, 255)), (0, 0, 30, 30)) for i in range(5)]
    labels = ["cup", "dog", "cup", "tv", "dog"]
    whole = classifier.logits(crops, labels)
    monkeypatch.setattr("tiltflow.scorers.geneval_color.CROPS_PER_PASS", 2)
    torch.testing.assert_close(classifier.logits(crops, labels), whole, atol=1e-4, rtol=0)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"CLIP.s tokenizer was not found"):
        load_color_classifier(tmp_path)


def test_published_files_may_list_the_positions(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert load_color_classifier(folder).size == 32
    save_file({**state, "extra": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"do not fit CLIPModel: unexpected extra;"):
        load_color_classifier(folder)


def test_an_incomplete_model(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip", drop="visual_projection.weight")
    with pytest.raises(RewardError, match=r"do not fit CLIPModel: missing visual_projection\.weight"):
        load_color_classifier(folder)


def test_an_answer_that_is_not_finite_is_no_color(tmp_path: Path) -> None:
    classifier = load_color_classifier(save_tiny_clip(tmp_path / "clip"))
    crops = [classifier.crop(flat((200, 0, 0)), (0, 0, 30, 30))]
    with torch.no_grad():
        classifier.model.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(RewardError, match="the CLIP that names colours answered NaN or infinite values"):
        classifier.colors(crops, ["cup"])
