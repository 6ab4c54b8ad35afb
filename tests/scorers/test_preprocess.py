"""Preprocessing against the numbers of the reference implementations, and the gradients through it."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.shared import case_tensors, golden, requires_shared
from tiltflow.scorers import clip_preprocess, hps_preprocess
from tiltflow.scorers.preprocess import CLIP_MEAN, CLIP_STD

CLIP_CASES = range(5)


def drawn(case: dict[str, Any]) -> Tensor:
    """Return the case's test image, uint8 `[H, W, 3]`, from its integer formula."""
    height, width = case["height"], case["width"]
    p0, p1, p2, p3, p4 = case["image_parameters"]
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    value = (p0 * x + p1 * y + 37 * c + (x * y * (c + 1)) // p2) % 256
    value = torch.where((x // p3 + y // p4 + c) % 3 == 0, 255 - value // 4, value)
    inside = (x - width // 2) ** 2 + (y - height // 2) ** 2 < (min(height, width) // 4) ** 2
    value = torch.where(inside, 20 * c + ((x * 255) // max(width - 1, 1)) // 2, value)
    return value.clamp(0, 255).to(torch.uint8)


def stats(values: Tensor) -> Tensor:
    flat = values.double().flatten()
    return torch.stack([flat.mean(), flat.std(correction=0), flat.abs().sum(), flat.min(), flat.max()])


@requires_shared
@pytest.mark.parametrize("index", CLIP_CASES)
def test_clip_preprocess_and_its_gradient(index: int) -> None:
    meta, tensors = golden("algorithms/clip_preprocess")
    assert len(meta["cases"]) == len(CLIP_CASES)
    case, expected = meta["cases"][index], case_tensors(tensors, index)
    image = drawn(case)
    assert hashlib.sha256(image.numpy().tobytes()).hexdigest() == case["image_sha256"]
    levels = image.float().requires_grad_()  # 0..255, rows first: what the expected gradient refers to
    output = clip_preprocess(levels.permute(2, 0, 1)[None] / 255)
    (output**2).mean().backward()
    torch.testing.assert_close(output[0, :, ::16, ::16], expected["output_every_16"], atol=2e-4, rtol=0)
    found = stats(output.detach())
    torch.testing.assert_close(found[:2], expected["output_stats"][:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], expected["output_stats"][2], atol=0, rtol=1e-5)
    torch.testing.assert_close(found[3:], expected["output_stats"][3:], atol=2e-4, rtol=0)
    means = output.detach().double().mean(dim=(0, 2, 3))
    torch.testing.assert_close(means, expected["output_channel_mean"], atol=1e-5, rtol=0)
    assert levels.grad is not None
    largest = expected["grad_stats"][3:].abs().max().item()
    every_8 = levels.grad[::8, ::8]
    torch.testing.assert_close(every_8, expected["grad_every_8"], atol=1e-3 * largest, rtol=0)
    if "grad_full" in expected:
        torch.testing.assert_close(levels.grad, expected["grad_full"], atol=1e-3 * largest, rtol=0)


@requires_shared
@pytest.mark.parametrize("index", CLIP_CASES)
def test_the_distance_to_the_pil_processor_is_the_stated_one(index: int) -> None:
    meta, tensors = golden("algorithms/clip_preprocess")
    case, expected = meta["cases"][index], case_tensors(tensors, index)
    output = clip_preprocess(drawn(case).permute(2, 0, 1)[None] / 255)[0, :, ::16, ::16]
    difference = (output - expected["hf_pil_every_16"]).abs().max().item()
    assert difference <= case["max_abs_diff_to_hf_pil"] + 2e-4


@requires_shared
@pytest.mark.parametrize("variant", ["antialias_on", "antialias_off"])
@pytest.mark.parametrize("index", range(3))
def test_hps_preprocess(index: int, variant: str) -> None:
    meta, tensors = golden("scorers/hps_preprocess")
    image = tensors[f"img{index}/u8"].permute(2, 0, 1)[None] / 255
    output = hps_preprocess(image, antialias=variant == "antialias_on")[0]
    assert list(output.shape) == meta["images"][index]["output_chw"]
    found = {
        "every16th": output[:, ::16, ::16],
        "row112": output[:, 112],
        "col112": output[:, :, 112],
        "channel_mean": output.mean(dim=(1, 2)),
        "channel_std": output.flatten(1).std(dim=1, correction=0),
        "channel_min": output.amin(dim=(1, 2)),
        "channel_max": output.amax(dim=(1, 2)),
    }
    prefix = f"img{index}/{variant}/"
    assert {prefix + name for name in found} == {name for name in tensors if name.startswith(prefix)}
    for name, value in found.items():
        expected = tensors[prefix + name]
        torch.testing.assert_close(value, expected, atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@requires_shared
def test_hps_preprocess_pads_what_the_reference_leaves_unpadded() -> None:
    _, tensors = golden("scorers/hps_preprocess")
    output = hps_preprocess(tensors["img3/u8"].permute(2, 0, 1)[None] / 255)[0]
    assert output.shape == (3, 224, 224)
    inside = output[:, 22:202]
    torch.testing.assert_close(inside[:, ::16, ::16], tensors["img3/antialias_on/every16th"], atol=2e-4, rtol=0)
    border = torch.cat([output[:, :22], output[:, 202:]], dim=1)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    torch.testing.assert_close(border, (-mean / std).expand_as(border), atol=1e-6, rtol=0)


@pytest.mark.parametrize("function", [clip_preprocess, hps_preprocess])
def test_images_of_several_sizes_keep_their_order(function: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = [torch.rand(3, *size, generator=generator) for size in ((30, 40), (30, 40), (50, 20), (30, 40))]
    output = function(batch, size=16)
    assert output.shape == (4, 3, 16, 16)
    for image, row in zip(batch, output, strict=True):
        torch.testing.assert_close(row, function(image[None], size=16)[0], atol=1e-6, rtol=0)
