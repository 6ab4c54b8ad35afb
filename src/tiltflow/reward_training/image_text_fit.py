"""From a config to an image-text reward model, its pairs and what was left out of them."""

from typing import Final

import torch
from pydantic import Field, model_validator

from tiltflow.data.drawn_pairs import DrawnPairs, draw_pairs
from tiltflow.data.image_preferences import ImagePreferences, PairFilter
from tiltflow.data.pair_sources import open_pairs
from tiltflow.reward_training.base import Batch, Fitting, Shown
from tiltflow.reward_training.fit_config import FitRunConfig, ImageTextFitConfig, RewardModelConfig, RewardModelKind
from tiltflow.reward_training.image_text import CLIPRewardModel, PickscoreRewardModel
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.clip_loading import load_clip_folder
from tiltflow.scorers.clip_new import ClipSizes, new_clip
from tiltflow.types import Config


class ImageTextModelConfig(RewardModelConfig):
    """Where the model starts from, and what of it learns how."""

    reward_model_type: str = "image_text"
    pretrained: str | None = None  # folder, or hub repository, of a CLIP in transformers' format
    from_scratch: ClipSizes | None = None  # or a new one of these sizes
    tokenizer: str | None = None  # of a pretrained one: folder or hub repository; None looks for it
    freeze_vision: bool = False
    freeze_text: bool = False
    freeze_logit_scale: bool = False
    # Share of the loss in which the other pairs of a micro-batch, on all processes, are wrong answers too.
    in_batch_negatives: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_start(self) -> "ImageTextModelConfig":
        if (self.pretrained is None) == (self.from_scratch is None):
            raise ValueError("give either pretrained (a folder or hub repository) or from_scratch (sizes)")
        if self.freeze_vision and self.freeze_text and self.freeze_logit_scale:
            raise ValueError("freeze_vision, freeze_text and freeze_logit_scale leave nothing to learn; unset one")
        if self.from_scratch is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: a model from_scratch learns its own from the prompts; leave it out")
        return self


class PairsConfig(Config):
    """One set of pairs."""

    source: str | None = None  # file, glob pattern, folder of shards, or hub id
    split: str | None = None  # of the folder or the hub's set
    drawn: DrawnPairs | None = None  # or drawn scenes

    @model_validator(mode="after")
    def _one_source(self) -> "PairsConfig":
        if (self.source is None) == (self.drawn is None):
            raise ValueError("give either source (a file, folder or hub id) or drawn (scenes drawn on demand)")
        if self.split is not None and self.source is None:
            raise ValueError(f"split={self.split!r} belongs to a source; drawn pairs have drawn.prompts")
        return self


class ImageTextDataConfig(PairFilter):
    """Which pairs are trained on and validated with; the filters hold for all of them."""

    train: PairsConfig
    validation: dict[str, PairsConfig] = Field(default_factory=dict[str, PairsConfig])  # by name


class ImageTextRunConfig(FitRunConfig):
    """Everything that decides the training of an image-text reward model."""

    model: ImageTextModelConfig
    data: ImageTextDataConfig
    train: ImageTextFitConfig = ImageTextFitConfig()


def build_image_text(model: ImageTextModelConfig, data: ImageTextDataConfig, *, seed: int) -> Fitting:
    """Read the pairs and load or make the model.

    Args:
        model: The model's section of the config.
        data: The data's section.
        seed: Seeds the weights of a model made from nothing.

    Raises:
        DataError: Pairs are missing or bad, and the config does not say to leave bad ones out.
        RewardError: The model is missing or cannot be read.
    """
    train = _read(data.train, data)
    validation = {name: _read(pairs, data) for name, pairs in data.validation.items()}
    notes = {f"train: {name}": count for name, count in train.notes.items()}
    for name, pairs in validation.items():
        notes.update({f"{name}: {reason}": count for reason, count in pairs.notes.items()})
    captions = list(dict.fromkeys(train.prompts))  # no others: a run may go on with another validation set
    return Fitting(build_model(model, captions, seed=seed), train, validation, notes, shows=show_pairs)


def build_model(config: ImageTextModelConfig, captions: list[str], *, seed: int) -> CLIPRewardModel:
    """Load or make the model.

    Args:
        config: Its section of the config.
        captions: What the tokenizer of a model made from nothing learns from.
        seed: Seeds its weights.

    Raises:
        RewardError: A pretrained model is missing or cannot be read.
    """
    if config.pretrained is not None:
        folder = WeightsFolder(config.pretrained).require()
        backbone = load_clip_folder(folder, tokenizer=config.tokenizer, share=False)
    else:
        backbone = new_clip(config.from_scratch or ClipSizes(), captions, seed=seed)
    towers = PickscoreRewardModel(
        backbone,
        freeze_vision=config.freeze_vision,
        freeze_text=config.freeze_text,
        freeze_logit_scale=config.freeze_logit_scale,
    )
    return CLIPRewardModel(towers, in_batch_negatives=config.in_batch_negatives)


def show_pairs(model: CLIPRewardModel, batch: Batch) -> list[Shown]:
    """Return the pairs of a batch that count, with label, reward and probability of each image."""
    rewards = torch.stack(model.pair_rewards(batch), dim=1).float()  # [B, 2]
    shown: list[Shown] = []
    for index, chances in enumerate(rewards.softmax(dim=1).tolist()):
        if batch["weight"][index] > 0:
            told = zip(batch["label"][index].tolist(), rewards[index].tolist(), chances, strict=True)
            notes = [
                f"label {label:g}, reward {reward:.2f}, probability {chance:.2f}" for label, reward, chance in told
            ]
            images = [batch[name][index].to(torch.uint8) for name in ("img_0", "img_1")]
            shown.append(Shown(batch["prompt"][index], images, notes))
    return shown


def _read(pairs: PairsConfig, rules: PairFilter) -> ImagePreferences:
    if pairs.drawn is not None:
        return ImagePreferences(draw_pairs(pairs.drawn), rules)
    return ImagePreferences(open_pairs(pairs.source or "", split=pairs.split), rules)


def _build(config: ImageTextRunConfig) -> Fitting:
    return build_image_text(config.model, config.data, seed=config.seed)


IMAGE_TEXT: Final = RewardModelKind(ImageTextRunConfig, _build, free=("data.validation", "data.on_bad_image"))
