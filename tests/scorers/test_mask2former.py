"""Mask2Former against mmdet's numbers, and the reading of its checkpoints."""

import copy
import json
import pickle
import re
import sys
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mask2FormerConfig

from tests.shared import SHARED, golden, requires_shared
from tests.tiny_detector import confident, mmdet_state, tiny_mask2former
from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import load_strictly
from tiltflow.scorers.mask2former import (
    GENEVAL_WEIGHTS,
    Mask2Former,
    Mask2FormerNetwork,
    find_mask2former,
    load_mask2former,
    resize_levels,
)
from tiltflow.scorers.mask2former_keys import convert_mmdet, mmdet_config, read_mmdet


@lru_cache(maxsize=1)
def fixture() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return the description, the tensors and the weights of the golden network."""
    meta, tensors = golden("scorers/mask2former_tiny")
    prefix = "state_dict/"
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert len(state) == meta["state_dict"]["count"] == 271
    return meta, {name: value for name, value in tensors.items() if not name.startswith(prefix)}, state


def network() -> Mask2FormerNetwork:
    _, _, state = fixture()
    made = Mask2FormerNetwork(mmdet_config(state, source="golden"))
    load_strictly(made, convert_mmdet(state), source="golden")
    return made.eval()


def picture(name: str) -> Tensor:
    return fixture()[1][name].permute(2, 0, 1)


def compare_instances(case: str, detector: Mask2Former, *, scores: float, boxes: float, area: float) -> None:
    tensors = fixture()[1]
    expected = {key: tensors[f"{case}/inst_{key}"] for key in ("scores", "labels", "boxes", "mask_area")}
    (found,) = detector.detect([picture(f"{case}/image_u8")])
    assert len(found.labels) == 100 and found.scores.dtype == torch.float32 and found.masks.dtype == torch.bool
    torch.testing.assert_close(found.scores, expected["scores"], atol=scores, rtol=0)
    areas = found.masks.sum((1, 2))
    rows: list[int] = []  # the found instance of each expected one: equals may stand in another order
    for i in range(100):
        fits = found.labels == expected["labels"][i]
        fits &= (found.scores - expected["scores"][i]).abs() < 2e-3
        fits &= (found.boxes - expected["boxes"][i]).abs().amax(1) <= boxes
        fits &= (areas - expected["mask_area"][i]).abs() <= area
        rows.append(next(row for row in fits.nonzero().flatten().tolist() if row not in rows))
    different = (found.masks[rows[:20]] != tensors[f"{case}/inst_masks_top20"].bool()).sum((1, 2))
    assert int(different.max()) <= area


@requires_shared
@pytest.mark.parametrize("case", ["case_a", "case_b"])
def test_golden_native_size(case: str) -> None:
    meta, tensors, _ = fixture()
    detector = Mask2Former(network(), resize="native")
    with torch.no_grad():
        classes, masks = detector.network(detector.prepare(picture(f"{case}/image_u8"))[None])
    tight = meta["tolerance"]["tight_float32_cpu_case_a_b"]
    torch.testing.assert_close(classes[0], tensors[f"{case}/class_logits"], atol=tight["class_logits_abs"], rtol=0)
    torch.testing.assert_close(masks[0], tensors[f"{case}/mask_logits"], atol=tight["mask_logits_abs"], rtol=0)
    loose = meta["tolerance"]["case_a_b"]
    compare_instances(
        case, detector, scores=loose["inst_scores_abs"], boxes=loose["boxes_abs"], area=loose["mask_area_abs_pixels"]
    )


@requires_shared
def test_golden_features_locate_a_fault() -> None:
    meta, tensors, _ = fixture()
    detector = Mask2Former(network(), resize="native")
    pixels = detector.prepare(picture("case_a/image_u8"))
    with torch.no_grad():
        output: Any = detector.network.model(pixels[None], output_hidden_states=True)
    found = {f"backbone_{i}": value for i, value in enumerate(output.encoder_hidden_states)}
    found |= {f"memory_{i}": value for i, value in enumerate(output.pixel_decoder_hidden_states)}
    found["mask_features"] = output.pixel_decoder_last_hidden_state
    assert len(found) == 8
    for name, value in found.items():
        reference = tensors[f"case_a/{name}_first8ch"]
        torch.testing.assert_close(
            value[0, :8], reference, atol=meta["tolerance"]["case_a_b"]["features_first8ch_abs"], rtol=0
        )
    stages = [detector.network.class_predictor(stage[:, 0]) for stage in output.transformer_decoder_intermediate_states]
    torch.testing.assert_close(torch.stack(stages), tensors["case_a/class_logits_all_stages"], atol=6e-5, rtol=0)
    restored = pixels * torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255
    restored += torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
    torch.testing.assert_close(restored, tensors["case_a/image_01"], atol=1e-6, rtol=0)


@requires_shared
def test_golden_800_pixels() -> None:
    meta, tensors, _ = fixture()
    detector = Mask2Former(network())
    # the resize is the reference's in every level, so the logits may be compared from the original image on
    assert torch.equal(resize_levels(picture("case_c/image_u8"), 800, 1000), picture("case_c/resized_u8"))
    pixels = detector.prepare(picture("case_c/image_u8"))
    assert pixels.shape == (3, 800, 1024) and not pixels[:, :, 1000:].any()
    with torch.no_grad():
        classes, masks = detector.network(pixels[None])
    loose = meta["tolerance"]["case_c_from_resized_u8"]
    torch.testing.assert_close(classes[0], tensors["case_c/class_logits"], atol=loose["class_logits_abs"], rtol=0)
    torch.testing.assert_close(
        masks[0, :, ::8, ::8], tensors["case_c/mask_logits"], atol=loose["mask_logits_abs"], rtol=0
    )
    compare_instances("case_c", detector, scores=loose["inst_scores_abs"], boxes=loose["boxes_abs"], area=8)


@pytest.mark.parametrize("shape", [(512, 512), (64, 64), (333, 777), (1200, 900), (1024, 1024), (1600, 1600)])
def test_the_resize_is_opencvs_in_every_level(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = min(1333 / max(shape), 800 / min(shape))
    height, width = (int(side * scale + 0.5) for side in shape)
    ours = resize_levels(torch.from_numpy(image).permute(2, 0, 1), height, width)
    theirs = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    assert torch.equal(ours.permute(1, 2, 0), torch.from_numpy(theirs))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def noise(seed: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@requires_shared
@pytest.mark.parametrize("version", [2, 3])
def test_the_published_layouts_become_the_full_size_network(version: int) -> None:
    manifest = json.loads((SHARED / f"data/manifests/mask2former_swin_s_coco_mmdet{version}.json").read_text())
    state = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in manifest["keys"].items()
    }
    assert len(state) == 649
    config = mmdet_config(state, source="manifest")
    backbone: Any = config.backbone_config
    assert (backbone.embed_dim, backbone.depths, backbone.num_heads) == (96, [2, 2, 18, 2], [3, 6, 12, 24])
    assert (backbone.window_size, backbone.mlp_ratio, config.num_attention_heads, config.num_labels) == (7, 4, 8, 80)
    default = Mask2FormerConfig()  # transformers' defaults are those of facebook/mask2former-swin-small-coco-instance
    for name in ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"):
        assert getattr(config, name) == getattr(default, name)
    for name in ("encoder_layers", "decoder_layers", "num_queries", "num_attention_heads"):
        assert getattr(config, name) == getattr(default, name)
    with torch.device("meta"):
        made = Mask2FormerNetwork(config)
    converted = {name: value.shape for name, value in convert_mmdet(state).items()}
    assert converted == {name: value.shape for name, value in made.state_dict().items()}


@requires_shared
def test_the_names_of_mmdet_2_and_3_hold_the_same() -> None:
    state = fixture()[2]
    old = {
        name.replace("encoder.layers.0.self_attn", "encoder.layers.0.attentions.0"): value
        for name, value in state.items()
    }
    assert old.keys() != state.keys()
    converted, expected = convert_mmdet(old), convert_mmdet(state)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_an_mmdet_file(tmp_path: Path, version: int, zipped: bool) -> None:
    path = tmp_path / "detector.pth"
    content = {"meta": {"CLASSES": ("person",), "epoch": 50}, "state_dict": OrderedDict(mmdet_state(version))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)  # mmdet publishes files of the old format
    detector = load_mask2former(str(path))
    assert not detector.training and not any(parameter.requires_grad for parameter in detector.parameters())
    assert detector.num_classes == 80 and detector.network.config.num_attention_heads == 4
    other = Mask2Former(detector.network, resize="native")
    (found,) = other.detect([noise(0, 64, 96)])
    assert found.masks.shape == (100, 64, 96) and found.scores.isfinite().all()
    (reference,) = Mask2Former(_direct(3), resize="native").detect([noise(0, 64, 96)])
    assert torch.equal(found.scores, reference.scores) and torch.equal(found.masks, reference.masks)


def _direct(version: int) -> Mask2FormerNetwork:
    state = mmdet_state(version)
    made = Mask2FormerNetwork(mmdet_config(state, source="tiny"))
    load_strictly(made, convert_mmdet(state), source="tiny")
    return made


def test_training_records_beside_the_weights_are_placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "detector.pth"
    name = "mmengine.logging.history_buffer"
    record = type("HistoryBuffer", (), {"__module__": name})
    for module in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules[name], "HistoryBuffer", record, raising=False)
    loss = record()
    vars(loss)["values"] = np.array([1.5, 2.5])
    torch.save({"state_dict": mmdet_state(3), "message_hub": {"loss": loss, "best": np.float64(0.4)}}, path)
    monkeypatch.undo()
    assert name not in sys.modules
    known = set(torch.serialization.get_safe_globals())
    assert read_mmdet(path).keys() == mmdet_state(3).keys()
    assert set(torch.serialization.get_safe_globals()) == known, "the placeholders hold for this file only"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


def test_a_file_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": mmdet_state(3), "meta": Evil()}, "detector.pth")
    with pytest.raises(RewardError, match="hold more than tensors and are not opened"):
        load_mask2former("detector.pth")
    assert not Path("was_run").exists()


def change(kind: str, state: dict[str, Tensor]) -> None:
    index = "backbone.stages.2.blocks.1.attn.w_msa.relative_position_index"
    if kind == "missing":
        del state["panoptic_head.mask_embed.2.bias"]
    elif kind == "unexpected":
        state["panoptic_head.extra.weight"] = torch.zeros(1)
    elif kind == "misshapen":
        state["panoptic_head.query_feat.weight"] = torch.zeros(3, 32)
    elif kind == "backbone":
        del state["backbone.norm3.weight"]
    elif kind == "order":
        state[index] = state[index].T.contiguous()
    else:
        state.clear()
        state["model.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"does not fit Mask2FormerNetwork: missing .*mask_embedder.1.0.bias$"),
        ("unexpected", r"does not fit Mask2FormerNetwork: unexpected panoptic_head.extra.weight$"),
        ("misshapen", r"queries_features.weight is \[3, 32\] instead of \[20, 32\]"),
        ("backbone", r"missing .*hidden_states_norms.stage4.weight"),
        ("order", r"relative_position_index numbers the positions of a window differently than Swin"),
        ("other", r"is no mmdet checkpoint of Mask2Former with a Swin backbone: it has no backbone"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, kind: str, message: str) -> None:
    state = mmdet_state(3)
    change(kind, state)
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    with pytest.raises(RewardError, match=message):
        load_mask2former(str(tmp_path / "detector.pth"))


def test_parts_without_weights_are_left_out() -> None:
    state = mmdet_state(3)
    more = {"data_preprocessor.mean": torch.zeros(3), "panoptic_head.loss_cls.class_weight": torch.ones(81)}
    assert convert_mmdet({**state, **more}).keys() == convert_mmdet(state).keys()


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    made = tiny_mask2former()
    made.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight" in names, (
        "the names of the published folder, which transformers translates while loading"
    )
    detector = load_mask2former(str(tmp_path))
    assert torch.equal(detector.network.class_predictor.weight, made.class_predictor.weight)
    loaded = detector.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in made.state_dict().items())


def test_a_folder_may_hold_the_class_weights_of_the_loss_and_nothing_else(tmp_path: Path) -> None:
    tiny_mask2former().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    save_file({**state, "criterion.empty_weight": torch.ones(81)}, file, {"format": "pt"})
    assert load_mask2former(str(tmp_path)).num_classes == 80
    save_file({**state, "extra.weight": torch.ones(81)}, file, {"format": "pt"})
    with pytest.raises(RewardError, match=r"does not fit Mask2Former: unexpected extra.weight"):
        load_mask2former(str(tmp_path))
    del state["class_predictor.bias"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(RewardError, match=r"does not fit Mask2Former: missing class_predictor.bias"):
        load_mask2former(str(tmp_path))
    save_file({**state, "class_predictor.bias": torch.ones(5)}, file, {"format": "pt"})
    with pytest.raises(RewardError, match=r"does not fit Mask2Former: class_predictor.bias has another shape"):
        load_mask2former(str(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny_mask2former().config.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="cannot be loaded as Mask2Former"):
        load_mask2former(str(tmp_path))


def test_where_weights_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path))
    first, second = (file.name for file in GENEVAL_WEIGHTS)
    assert first == "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"
    assert second == "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
    with pytest.raises(RewardError, match=rf"{re.escape(first)} were not found; get them from download.openmmlab.com"):
        load_mask2former()
    with pytest.raises(RewardError, match=r"the weights mine.pth were not found"):
        load_mask2former("mine.pth")
    with pytest.raises(RewardError, match=r"the model someone/mask2former was not found; download it"):
        load_mask2former("someone/mask2former")
    (tmp_path / second).touch()
    assert find_mask2former() == tmp_path / second
    (tmp_path / first).touch()
    assert find_mask2former() == tmp_path / first
    (tmp_path / "mine.pth").touch()
    assert find_mask2former("mine.pth") == tmp_path / "mine.pth"


# --- detection --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_network() -> Mask2FormerNetwork:
    return confident(tiny_mask2former())


def test_images_of_any_sizes_in_batches_and_alone(random_network: Mask2FormerNetwork) -> None:
    detector = Mask2Former(random_network, resize="native")
    images = [noise(0, 64, 64), noise(1, 64, 96), noise(2, 60, 50), noise(3, 64, 64), noise(4, 33, 1)]
    together = detector.detect(images)
    alone = [detector.detect([image], batch_size=1)[0] for image in images]
    assert [found.masks.shape[1:] for found in together] == [image.shape[1:] for image in images]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=1e-4, rtol=0)
    assert detector.detect([]) == []


def test_a_least_score_leaves_out_the_rest_and_changes_nothing(random_network: Mask2FormerNetwork) -> None:
    detector = Mask2Former(random_network, resize="native")
    (everything,) = detector.detect([noise(0, 64, 96)])
    assert everything.scores.diff().le(0).all() and 0 < int((everything.scores > 0.3).sum()) < 100
    (best,) = detector.detect([noise(0, 64, 96)], min_score=0.3)
    count = int((everything.scores > 0.3).sum())
    assert torch.equal(best.labels, everything.labels[:count]) and torch.equal(best.masks, everything.masks[:count])
    torch.testing.assert_close(best.scores, everything.scores[:count])
    assert torch.equal(best.boxes, everything.boxes[:count])
    (nothing,) = detector.detect([noise(0, 64, 96)], min_score=1.0)
    assert nothing.masks.shape == (0, 64, 96) and nothing.boxes.shape == (0, 4) and len(nothing.scores) == 0


def test_boxes_enclose_their_masks(random_network: Mask2FormerNetwork) -> None:
    (found,) = Mask2Former(random_network, resize="native").detect([noise(0, 64, 96)])
    assert (found.masks.sum((1, 2)) > 0).any()
    for mask, box in zip(found.masks, found.boxes.tolist(), strict=True):
        ys, xs = mask.nonzero(as_tuple=True)
        expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
        assert box == [float(edge) for edge in expected]


def test_bgr_is_rgb_of_the_exchanged_image(random_network: Mask2FormerNetwork) -> None:
    image = noise(0, 64, 96)
    rgb, bgr = (Mask2Former(random_network, resize="native", channels=order) for order in ("rgb", "bgr"))
    assert torch.equal(bgr.prepare(image), rgb.prepare(image.flip(0)))
    assert not torch.equal(bgr.prepare(image), rgb.prepare(image))


def test_half_precision_scores_are_near(random_network: Mask2FormerNetwork) -> None:
    (exact,) = Mask2Former(random_network, resize="native").detect([noise(0, 64, 96)])
    half = Mask2Former(copy.deepcopy(random_network), resize="native").to(torch.bfloat16)
    (found,) = half.detect([noise(0, 64, 96)])
    assert found.scores.dtype == torch.float32 and found.scores.isfinite().all()
    assert abs(float(found.scores[0] - exact.scores[0])) < 0.1


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
def test_a_used_detector_can_be_copied(random_network: Mask2FormerNetwork, remake: Any) -> None:
    detector = Mask2Former(copy.deepcopy(random_network), resize="native", channels="bgr").to(torch.bfloat16)
    (before,) = detector.detect([noise(0, 64, 96)])
    copied = remake(detector)
    (after,) = copied.detect([noise(0, 64, 96)])
    assert copied.network.class_predictor.weight.dtype == torch.bfloat16 and copied.channels == "bgr"
    assert not copied.training and not any(parameter.requires_grad for parameter in copied.parameters())
    assert torch.equal(after.scores, before.scores) and torch.equal(after.masks, before.masks)


@pytest.mark.parametrize(("name", "value"), [("resize", "800"), ("channels", "RGB")])
def test_unknown_switches(random_network: Mask2FormerNetwork, name: str, value: Any) -> None:
    with pytest.raises(RewardError, match=f"{name}='{value}' must be one of"):
        Mask2Former(random_network, **{name: value})
