"""Losses of an image-text reward model that saw two images of one prompt and which of them people preferred.

Every loss exists twice: as the mean that papers write, and as `..._rows`, one number per pair, of which a trainer makes
sums that add up over micro-batches and processes.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.errors import TrainingError

SMOOTHING: Final = 1e-4  # keeps the entropy of a label of 0 or 1 finite


def preference_kl(rewards_0: Tensor, rewards_1: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the divergence of the softmax of two rewards from the labels, and how often the two agree.

        q = log_softmax([r0, r1])        p = (l + 1e-4) / sum(l + 1e-4)
        loss = mean_i [ sum_k p log p - sum_k l q ]

    The smoothing is in the entropy alone, which has no gradient: a label (1, 0) that is predicted perfectly gives
    -0.00102, a tie that is predicted perfectly 0, and the gradient is that of the cross entropy with the labels.

    Args:
        rewards_0: Reward of each pair's first image, `[B]`.
        rewards_1: Reward of its second image, `[B]`.
        labels: How much each of them was preferred, `[B, 2]` in [0, 1]; (1, 0), (0, 1), or (0.5, 0.5) for a tie.

    Returns:
        The loss, float32 unless the rewards are float64; and `accuracy`: the share of pairs with a preference (a label
        above 0.5) whose preferred image has the higher reward, NaN if there is none; equal rewards are no agreement.

    Raises:
        TrainingError: The shapes do not fit.

    Source: the loss of NeMo-Aligner's image-text reward models (`image_text_rms.py`, `loss_func`).
    """
    rows = preference_kl_rows(rewards_0, rewards_1, labels)
    decided, agreeing = agreement(rewards_0, rewards_1, labels)
    dtype = torch.promote_types(rewards_0.dtype, torch.float32)
    return rows.mean().to(dtype), {"accuracy": agreeing.sum() / decided.sum()}


def preference_kl_rows(rewards_0: Tensor, rewards_1: Tensor, labels: Tensor) -> Tensor:
    """Return the terms of which `preference_kl` is the mean, float64 `[B]`: they are few, and add up exactly."""
    _check_shapes(rewards_0, rewards_1, labels)
    rewards = torch.stack([rewards_0, rewards_1], dim=-1).double()
    labels = labels.to(rewards)
    smooth = (labels + SMOOTHING) / (labels + SMOOTHING).sum(dim=-1, keepdim=True)
    entropy = (smooth * smooth.log()).sum(dim=-1).detach()
    return entropy - (labels * F.log_softmax(rewards, dim=-1)).sum(dim=-1)


def agreement(rewards_0: Tensor, rewards_1: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs have a preference and which of these the rewards agree with, both 0 or 1, float64 `[B]`."""
    decided = labels.amax(dim=-1) > 0.5
    first = labels[:, 0] > labels[:, 1]
    right = torch.where(first, rewards_0 > rewards_1, rewards_1 > rewards_0)
    return decided.double(), (decided & right).double()


def pickscore_criterion(
    text_features: Tensor,
    image_0_features: Tensor,
    image_1_features: Tensor,
    labels: Tensor,
    *,
    logit_scale: Tensor | float,
    num_examples_per_prompt: Tensor | None = None,
    in_batch_negatives: bool = False,
) -> Tensor:
    """Return PickScore's loss on unit features.

        logits of text i: s <t_i, image_0_i> and s <t_i, image_1_i>
        text_i = l0 CE(image 0) + l1 CE(image 1) + log(1/2) [l0 = l1]
        loss = sum_i w_i text_i,   w_i = (1 / n_i) / sum_j (1 / n_j)

    With in-batch negatives a text is compared with all 2B images, every image with all B texts, and

        image_i = l0 CE(text_i | image_0_i) + l1 CE(text_i | image_1_i)
        loss = sum_i w_i (image_i + text_i) / 2

    Args:
        text_features: L2-normalised, `[B, D]`.
        image_0_features: L2-normalised, `[B, D]`.
        image_1_features: L2-normalised, `[B, D]`.
        labels: `[B, 2]`.
        logit_scale: What cosines are multiplied by, s; not its logarithm.
        num_examples_per_prompt: How many pairs of the whole data set have this prompt, n, `[B]`; None: all alike.
        in_batch_negatives: Whether the other pairs' images and texts are wrong answers.

    Raises:
        TrainingError: The shapes do not fit.

    Source: Kirstain et al. 2023 (arXiv 2305.01569), eq. 2, and the trainer published with it (`clip_criterion.py`).
    """
    if in_batch_negatives:
        columns = Columns(text_features, image_0_features, image_1_features)
        rows = contrastive_rows(columns, columns, labels, logit_scale=logit_scale, offset=0)
    else:
        _check_features(text_features, image_0_features, image_1_features, labels)
        logits = [logit_scale * (text_features * image).sum(dim=-1) for image in (image_0_features, image_1_features)]
        cross = -(labels * F.log_softmax(torch.stack(logits, dim=-1), dim=-1)).sum(dim=-1)
        rows = cross + tie_offset(labels)
    if num_examples_per_prompt is None:
        return rows.mean()
    weights = 1 / num_examples_per_prompt.to(rows)
    return (weights * rows).sum() / weights.sum()


class Columns:
    """Unit features of N pairs with which texts and images are compared: each `[N, D]`."""

    def __init__(self, texts: Tensor, images_0: Tensor, images_1: Tensor):
        self.texts = texts
        self.images_0 = images_0
        self.images_1 = images_1

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> "Columns":
        return Columns(self.texts[rows], self.images_0[rows], self.images_1[rows])


def contrastive_rows(
    own: Columns, columns: Columns, labels: Tensor, *, logit_scale: Tensor | float, offset: int
) -> Tensor:
    """Return the terms `(image_i + text_i) / 2` of `pickscore_criterion` with in-batch negatives, `[B]`.

    Args:
        own: The B pairs that the terms are of.
        columns: All N pairs of the batch, those of other processes included.
        labels: `[B, 2]`, of the own pairs.
        logit_scale: What cosines are multiplied by.
        offset: The place of the first own pair in `columns`.

    Raises:
        TrainingError: The shapes do not fit.
    """
    _check_features(own.texts, own.images_0, own.images_1, labels)
    place = torch.arange(offset, offset + len(own), device=labels.device)
    images = torch.cat([columns.images_0, columns.images_1])
    by_text = F.log_softmax(logit_scale * own.texts @ images.T, dim=-1)  # [B, 2N]
    picked = torch.stack([place, place + len(columns)], dim=-1)
    text = -(labels * by_text.gather(1, picked)).sum(dim=-1) + tie_offset(labels)
    by_image = [
        F.log_softmax(logit_scale * image @ columns.texts.T, dim=-1).gather(1, place[:, None])
        for image in (own.images_0, own.images_1)  # each [B, 1]
    ]
    image = -(labels * torch.cat(by_image, dim=-1)).sum(dim=-1)
    return (image + text) / 2


def tie_offset(labels: Tensor) -> Tensor:
    """Return log(1/2) for ties, so that a perfectly predicted one costs nothing, and 0 for the rest, `[B]`."""
    return math.log(0.5) * (labels[:, 0] == labels[:, 1]).to(labels.dtype)


def _check_shapes(rewards_0: Tensor, rewards_1: Tensor, labels: Tensor) -> None:
    if not (rewards_0.ndim == 1 and rewards_0.shape == rewards_1.shape and labels.shape == (len(rewards_0), 2)):
        shapes = [list(tensor.shape) for tensor in (rewards_0, rewards_1, labels)]
        raise TrainingError(f"rewards_0, rewards_1 and labels are {shapes}; they must be [B], [B] and [B, 2]")


def _check_features(texts: Tensor, images_0: Tensor, images_1: Tensor, labels: Tensor) -> None:
    same = texts.ndim == 2 and texts.shape == images_0.shape == images_1.shape
    if not (same and labels.shape == (len(texts), 2)):
        shapes = [list(tensor.shape) for tensor in (texts, images_0, images_1, labels)]
        raise TrainingError(f"texts, first and second images and labels are {shapes}; they must be [B, D] and [B, 2]")
