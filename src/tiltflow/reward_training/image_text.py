"""Image-text reward models: a CLIP whose scaled cosine is a reward, fitted to which of two images is better."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch import Tensor, nn

from tiltflow.errors import RewardError
from tiltflow.reward_training.base import Batch, Totals, TrainableRewardModel
from tiltflow.reward_training.gathering import gather_rows
from tiltflow.reward_training.preference import Columns, agreement, contrastive_rows, preference_kl_rows
from tiltflow.runtime.distributed import check_divisible
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.clip_backbone import ClipBackbone
from tiltflow.scorers.clip_loading import load_clip_folder
from tiltflow.scorers.clip_new import save_clip
from tiltflow.scorers.preprocess import clip_preprocess_levels
from tiltflow.types import DTYPES, Config, PathText, PathTextOrNone

Levels = Tensor | Sequence[Tensor]  # [B, H, W, 3], or B tensors [H, W, 3] of any sizes; in [0, 255], float or uint8
Precision = Literal["fp32", "bf16", "fp16"]
# What a batch's totals are made of, in the order in which `_totals` adds them up.
SUMS: Final = (
    "weight",
    "loss",
    "pairs",
    "decided",
    "agreeing",
    "margin",
    "reward",
    "squared_reward",
    "logit_scale",
    "skipped",
)


class RewardInferenceConfig(Config):
    """Which trained model `get_reward_model` loads."""

    pretrained: PathText  # folder, or hub repository, of a CLIP in transformers' format
    tokenizer: PathTextOrNone = None  # folder or hub repository of CLIP's tokenizer; None looks for it
    precision: Precision = "fp32"
    device: str = "cpu"


METRICS: Final = ("loss", "acc", "margin", "reward_mean", "reward_std", "logit_scale", "pairs", "skipped")


@final
class PickscoreRewardModel(nn.Module):
    """The towers of a CLIP and the scale of their cosine, all of which may learn.

    R = exp(logit_scale) cos(image, text), pair by pair: no text meets another one's image. A model made from nothing
    starts at logit_scale = log(1 / 0.07).

    Source: PickScore (arXiv 2305.01569, eq. 1).
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        *,
        freeze_vision: bool = False,
        freeze_text: bool = False,
        freeze_logit_scale: bool = False,
    ):
        """Let everything learn that is not frozen.

        Args:
            backbone: The network, for nobody else's use: it is changed.
            freeze_vision: Leave the vision tower and its projection as they are.
            freeze_text: Leave the text tower and its projection as they are.
            freeze_logit_scale: Leave the scale as it is.

        Raises:
            RewardError: Everything is frozen.
        """
        super().__init__()
        if freeze_vision and freeze_text and freeze_logit_scale:
            raise RewardError("freeze_vision, freeze_text and freeze_logit_scale leave nothing to learn; unset one")
        self.backbone = backbone
        model = backbone.model
        self._frozen: list[nn.Module] = [
            *((model.vision_model, model.visual_projection) if freeze_vision else ()),
            *((model.text_model, model.text_projection) if freeze_text else ()),
        ]
        backbone.requires_grad_(True)
        for tower in self._frozen:
            tower.requires_grad_(False)
        # Its own parameter of one number, for FSDP shards no scalars; the network's is written when it is saved.
        initial = model.logit_scale.detach().clone()
        del model.logit_scale
        model.register_buffer("logit_scale", initial)
        self.logit_scale = nn.Parameter(initial.reshape(1).clone(), requires_grad=not freeze_logit_scale)
        self.train()

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, exp(logit_scale): a float32 scalar, float64 of a model in float64."""
        return self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp().squeeze(0)

    def save_pretrained(self, folder: Path) -> None:
        """Write a CLIP in transformers' format."""
        with torch.no_grad():
            self.backbone.model.logit_scale.copy_(self.logit_scale.squeeze(0))
        save_clip(self.backbone, folder)

    def get_reward(self, images: Tensor, captions: Tensor) -> Tensor:
        """Return the rewards of B images, float32 `[B]`.

        Args:
            images: Preprocessed, `[B, 3, S, S]`.
            captions: Token ids, `[B, L]`, each row ended by the end-of-text token.

        Raises:
            RewardError: The images are not what the vision tower reads, or there are not as many captions.
        """
        size = self.backbone.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or len(captions) != len(images):
            raise RewardError(
                f"images {list(images.shape)} with captions {list(captions.shape)}: pass [B, 3, {size}, {size}] and "
                "[B, L], or give pixels and strings to CLIPRewardModel.get_reward"
            )
        cosine = (self.backbone.encode_pixels(images) * self.backbone.encode_tokens(captions)).sum(dim=-1)
        return self.scale * cosine

    def forward(self, images: Tensor, captions: Tensor) -> Tensor:
        """Return the rewards, as `get_reward`."""
        return self.get_reward(images, captions)

    def train(self, mode: bool = True) -> "PickscoreRewardModel":
        """Enter training or eval mode; frozen towers stay in eval mode."""
        super().train(mode)
        for tower in self._frozen:
            tower.eval()
        return self


@final
class CLIPRewardModel(TrainableRewardModel):
    """A PickscoreRewardModel over pixels and strings: what a generator is trained with, and what a trainer fits."""

    def __init__(
        self, model: PickscoreRewardModel, *, in_batch_negatives: float = 0.0, micro_batch_size: int | None = None
    ):
        """Wrap a model.

        Args:
            model: The towers.
            in_batch_negatives: Share of the training loss, from 0 to 1, in which the other pairs of a micro-batch, on
                all processes, are wrong answers too; 1 is PickScore's option.
            micro_batch_size: How many images `get_reward` shows to the vision tower at once; None: all.
        """
        super().__init__()
        self.model = model
        self.in_batch_negatives = in_batch_negatives
        self.micro_batch_size = micro_batch_size

    @property
    def blocks(self) -> Sequence[str]:
        """The layers of both towers, as transformers names them."""
        return sorted(self.model.backbone.model._no_split_modules or ())

    def preprocess(self, images: Levels, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the towers read: pixels `[B, 3, S, S]`, differentiable, and token ids `[B, L]`.

        Args:
            images: B images in [0, 255].
            captions: B strings; one that is too long is cut.

        Raises:
            RewardError: An image is not `[H, W, 3]`, or there are not as many captions as images.
        """
        if len(images) != len(captions):
            raise RewardError(f"{len(images)} images with {len(captions)} captions: give every image its own caption")
        return self._pixels(images), self._tokens(captions)

    def get_reward(self, images: Levels, captions: Sequence[str]) -> Tensor:
        """Return the rewards of B images, float32 `[B]` (float64 of a model in float64), differentiable to the pixels.

        Arguments and errors are those of `preprocess`.
        """
        step = self.micro_batch_size or max(len(images), 1)
        if len(images) != len(captions):
            self.preprocess(images, captions)  # tells the two numbers
        parts = [slice(start, start + step) for start in range(0, len(images), step)]
        rewards = [self.model.get_reward(*self.preprocess(images[part], captions[part])) for part in parts]
        return torch.cat(rewards) if rewards else torch.zeros(0, device=self.model.backbone.device)

    def pair_rewards(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rewards of both images of every pair, each float32 `[B]`."""
        columns = self._features(batch)
        return self._rewards(columns)

    def weight(self, batch: Batch) -> float:
        """Return the sum of the pairs' weights."""
        return float(batch["weight"].double().sum())

    def forward(self, batch: Batch) -> tuple[Tensor, Totals]:
        """Return the weighted sum of the pairs' losses, and sums for `metrics`.

        The loss of a pair is the divergence of `preference_kl`; with in-batch negatives a share of it is that of
        `pickscore_criterion`, in training mode only: what validation tells does not depend on what shares a batch.

        Args:
            batch: `img_0` and `img_1`: B tensors `[H, W, 3]`; `prompt`: B strings; `label`: `[B, 2]`; `weight`: `[B]`;
                `skipped`: `[B]`, 1 for a pair that was left out because an image cannot be read.
        """
        device = self.model.backbone.device
        weights, labels = batch["weight"].to(device), batch["label"].to(device)
        columns = self._features(batch)
        rewards = self._rewards(columns)
        loss = torch.where(weights > 0, weights.double() * preference_kl_rows(*rewards, labels), 0).sum()
        if self.in_batch_negatives and self.training:
            loss = loss.lerp(self._contrast(columns, labels, weights).double(), self.in_batch_negatives)
        detached = rewards[0].detach(), rewards[1].detach()
        return loss.float(), self._totals(loss.detach(), detached, labels, weights, batch["skipped"])

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Return the loss, `acc` over pairs with a preference, and what the rewards look like.

        `margin` is the mean of the preferred image's reward minus the other's; `skipped` counts pairs left out because
        an image could not be read.
        """
        mean = _ratio(totals["reward"], 2 * totals["pairs"])
        variance = _ratio(totals["squared_reward"], 2 * totals["pairs"]) - mean**2
        return {
            "loss": _ratio(totals["loss"], totals["weight"]),
            "acc": _ratio(totals["agreeing"], totals["decided"]),
            "margin": _ratio(totals["margin"], totals["decided"]),
            "reward_mean": mean,
            "reward_std": variance if math.isnan(variance) else max(variance, 0.0) ** 0.5,
            "logit_scale": _ratio(totals["logit_scale"], totals["pairs"]),
            "pairs": totals["pairs"],
            "skipped": totals["skipped"],
        }

    @property
    def metric_names(self) -> Sequence[str]:
        """The keys of `metrics`."""
        return METRICS

    def save_pretrained(self, folder: Path) -> None:
        """Write a CLIP in transformers' format, which the reward `PickScore` loads too."""
        self.model.save_pretrained(folder)

    def enable_gradient_checkpointing(self) -> None:
        """Compute the activations of both towers' layers again in the backward pass."""
        self.model.backbone.checkpoint_activations()

    def _pixels(self, images: Levels) -> Tensor:
        device = self.model.backbone.device
        for image in images[:1] if isinstance(images, Tensor) else images:
            if image.ndim != 3 or image.shape[-1] != 3:
                raise RewardError(f"an image is {list(image.shape)}; pass [H, W, 3], levels from 0 to 255")
        dtype = torch.promote_types(self.model.backbone.dtype, torch.float32)
        if isinstance(images, Tensor):
            moved: Levels = images.to(device, dtype)
        else:
            moved = [image.to(device, dtype) for image in images]
        return clip_preprocess_levels(moved, size=self.model.backbone.image_size)

    @property
    def caption_tokens(self) -> int:
        """How many tokens the text tower reads, both ends included."""
        return self.model.backbone.model.text_model.embeddings.position_embedding.num_embeddings

    def caption_lengths(self, captions: Sequence[str]) -> list[int]:
        """Return how many tokens each caption has before it is cut, both ends included."""
        if not captions:
            return []
        return [len(ids) for ids in self.model.backbone.tokenizer(list(captions), verbose=False)["input_ids"]]

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        backbone = self.model.backbone
        tokens = backbone.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.caption_tokens, return_tensors="pt"
        )
        return tokens["input_ids"].to(backbone.device)

    def _features(self, batch: Batch) -> Columns:
        """Encode every image and every prompt of a batch once."""
        backbone, count = self.model.backbone, len(batch["prompt"])
        images = backbone.encode_pixels(self._pixels([*batch["img_0"], *batch["img_1"]]))
        return Columns(backbone.encode_tokens(self._tokens(batch["prompt"])), images[:count], images[count:])

    def _rewards(self, columns: Columns) -> tuple[Tensor, Tensor]:
        scale = self.model.scale
        first, second = ((columns.texts * images).sum(dim=-1) for images in (columns.images_0, columns.images_1))
        return scale * first, scale * second

    def _contrast(self, columns: Columns, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the criterion's weighted terms; rows of weight 0 are nobody's wrong answer either."""
        counts = weights > 0
        (texts, place), (first, _), (second, _) = map(gather_rows, (columns.texts, columns.images_0, columns.images_1))
        everyone = gather_rows(counts.to(torch.uint8))[0].bool()
        scale = self.model.scale
        if not everyone.any():  # of no value, but every parameter still has its gradient
            return 0.0 * (scale + texts.sum() + first.sum() + second.sum())
        place = int(everyone[:place].sum())
        own = columns[counts]
        # The products of autocast would round logits of about 20 to an eighth.
        with torch.autocast(device_type=labels.device.type, enabled=False):
            rows = contrastive_rows(
                own,
                Columns(texts, first, second)[everyone],
                labels[counts],
                logit_scale=scale,
                offset=place,
            )
        return (weights[counts] * rows).sum()

    def _totals(
        self, loss: Tensor, rewards: tuple[Tensor, Tensor], labels: Tensor, weights: Tensor, skipped: Tensor
    ) -> Totals:
        counts = weights > 0
        decided, agreeing = (each[counts].sum() for each in agreement(rewards[0], rewards[1], labels))
        difference = torch.where(labels[:, 0] > labels[:, 1], 1.0, -1.0) * (rewards[0] - rewards[1]).double()
        margin = difference[counts & (labels.amax(dim=-1) > 0.5)].sum()
        counted = torch.cat([reward[counts].double() for reward in rewards])
        scale = self.model.scale.detach() * counts.sum()
        left_out = skipped.to(weights.device).sum()
        values = (
            weights.sum(),
            loss,
            counts.sum(),
            decided,
            agreeing,
            margin,
            counted.sum(),
            (counted**2).sum(),
            scale,
            left_out,
        )
        return dict(zip(SUMS, torch.stack([value.double() for value in values]).tolist(), strict=True))


def get_reward_model(cfg: RewardInferenceConfig | Mapping[str, Any], mbs: int, gbs: int) -> CLIPRewardModel:
    """Load a trained reward model to score with, or to train a generator with: frozen, in eval mode.

    Args:
        cfg: Which one, a `RewardInferenceConfig` or its keys.
        mbs: Images that go through the vision tower at once.
        gbs: Images of one step on all processes; a multiple of `mbs`.

    Raises:
        RewardError: The model is missing or cannot be read.
        GeometryError: `mbs` does not divide `gbs`.

    Example: `get_reward_model({"pretrained": "yuvalkirstain/PickScore_v1"}, mbs=4, gbs=32)`.
    """
    config = cfg if isinstance(cfg, RewardInferenceConfig) else RewardInferenceConfig.model_validate(dict(cfg))
    check_divisible("mbs", mbs, 1, why="a number of images")
    check_divisible("gbs", gbs, mbs, why="whole micro-batches")
    folder = WeightsFolder(config.pretrained).require()
    backbone = load_clip_folder(
        folder, device=config.device, dtype=DTYPES[config.precision], tokenizer=config.tokenizer, share=False
    )
    model = CLIPRewardModel(PickscoreRewardModel(backbone), micro_batch_size=mbs)
    model.eval().requires_grad_(False)
    return model


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
