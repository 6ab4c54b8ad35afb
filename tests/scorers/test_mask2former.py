"""Mask2Former against mmdet's numbers, and the reading of its checkpoints."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.shared import SHARED, golden, requires_shared
from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import load_strictly
from tiltflow.scorers.mask2former import (
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
