"""Image preprocessing in torch, differentiable, without torchvision.

Both functions resize in floating point and never clamp, so the bicubic overshoot outside [0, 1] survives: that is what
the networks saw when their references were measured, and what lets a gradient through.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
LEVEL: Final = 0.00392156862745098  # 1/255, to the digit that published processors multiply by


def clip_preprocess(images: Tensor | Sequence[Tensor], *, size: int = 224) -> Tensor:
    """Resize the shorter side to `size` (bicubic, antialiased), crop the centre and normalise: CLIP's preprocessing.

    Args:
        images: `[B, 3, H, W]`, or B tensors `[3, H, W]` of any sizes; float in [0, 1].
        size: Side of the square that the network reads.

    Returns:
        `[B, 3, size, size]`, differentiable to the pixels.

    Source: the CLIP processor, in the tensor form of NeMo-Aligner's `image_text_rms.py`.
    """
    return normalise(torch.cat([_resize_and_crop(part, size) for part in _by_size(images)]))


def clip_preprocess_levels(images: Tensor | Sequence[Tensor], *, size: int = 224) -> Tensor:
    """Do what `clip_preprocess` does to images whose pixels are levels of a byte, in rows of pixels.

    The order is that of the reference to the letter: resize the levels, crop, multiply by 1/255, normalise.

    Args:
        images: `[B, H, W, 3]`, or B tensors `[H, W, 3]` of any sizes; float in [0, 255].
        size: Side of the square that the network reads.

    Returns:
        `[B, 3, size, size]`, differentiable to the pixels.

    Source: `differentiable_preprocess` of NeMo-Aligner's `image_text_rms.py`.
    """
    channels_first = images.movedim(-1, 1) if isinstance(images, Tensor) else [image.movedim(-1, 0) for image in images]
    return normalise(LEVEL * torch.cat([_resize_and_crop(part, size) for part in _by_size(channels_first)]))


def hps_preprocess(images: Tensor | Sequence[Tensor], *, size: int = 224, antialias: bool = True) -> Tensor:
    """Resize the longer side to `size` (bicubic), pad with zeros to a square and normalise: HPSv2's preprocessing.

    Args:
        images: `[B, 3, H, W]`, or B tensors `[3, H, W]` of any sizes; float in [0, 1].
        size: Side of the square that the network reads.
        antialias: As current installs of HPSv2 resize; False as those of 2023 did.

    Returns:
        `[B, 3, size, size]`, differentiable to the pixels. An image whose longer side already is `size` is padded too;
        the reference leaves it as it is and then fails.

    Source: tgxs002/HPSv2 `transform.py`.
    """
    return normalise(torch.cat([_resize_and_pad(part, size, antialias=antialias) for part in _by_size(images)]))


def normalise(images: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its standard deviation, `[B, 3, H, W]`."""
    mean = torch.tensor(CLIP_MEAN, dtype=images.dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return (images - mean) / std


def _by_size(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the images as batches `[b, 3, H, W]` of one size each, in order."""
    if isinstance(images, Tensor):
        return [images]
    parts: list[list[Tensor]] = []
    for image in images:
        if parts and parts[-1][0].shape == image.shape:
            parts[-1].append(image)
        else:
            parts.append([image])
    return [torch.stack(part) for part in parts]


def _resize_and_crop(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    if target != (height, width):
        images = F.interpolate(images, size=target, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return images[..., top : top + size, left : left + size]


def _resize_and_pad(images: Tensor, size: int, *, antialias: bool) -> Tensor:
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    target = (round(height * scale), round(width * scale))
    if target != (height, width):
        images = F.interpolate(images, size=target, mode="bicubic", antialias=antialias, align_corners=False)
    down, right = size - target[0], size - target[1]
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
