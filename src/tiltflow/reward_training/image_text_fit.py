"""From a config to an image-text reward model, its pairs and what was left out of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field, model_validator

from tiltflow.data.drawn_pairs import DrawnPairs, draw_pairs
from tiltflow.data.image_preferences import ImagePreferences, PairFilter, read_image_preferences
from tiltflow.reward_training.base import Batch, Fitting, Shown
from tiltflow.reward_training.fit_config import FitRunConfig, ImageTextFitConfig, RewardModelConfig, RewardModelKind
from tiltflow.reward_training.image_text import CLIPRewardModel, PickscoreRewardModel
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.clip_loading import load_clip_checkpoint, load_clip_folder
from tiltflow.scorers.clip_new import ClipSizes, new_clip
from tiltflow.scorers.open_clip import HiddenAct
from tiltflow.types import Config, PathTextOrNone


class ImageTextModelConfig(RewardModelConfig):
    """Where the model starts from, and what of it learns how."""

    reward_model_type: str = "image_text"
    pretrained: PathTextOrNone = None  # folder or hub repository of a CLIP in transformers' format, or open_clip's file
    hidden_act: HiddenAct | None = None  # of open_clip's file, which does not say it: gelu for LAION's and HPSv2's
    from_scratch: ClipSizes | None = None  # or a new one of these sizes
    tokenizer: PathTextOrNone = None  # of a pretrained one: folder or hub repository; None looks for it
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
        if self.hidden_act is None and self.pretrained is not None and Path(self.pretrained).is_file():
            raise ValueError(f"pretrained={self.pretrained!r}: a file of open_clip does not say its hidden_act; set it")
        if self.hidden_act is not None and not (self.pretrained is not None and Path(self.pretrained).is_file()):
            raise ValueError(
                f"hidden_act={self.hidden_act!r} belongs to a file of open_clip, and pretrained={self.pretrained!r} is "
                "no file; leave it out, or correct the path"
            )
        if self.from_scratch is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: a model from_scratch learns its own from the prompts; leave it out")
        return self


class PairsConfig(Config):
    """One set of pairs; a text alone is its source."""

    source: str | None = None  # file, glob pattern, folder of shards, or owner/name:config@split of the hub
    split: str | None = None  # of the folder or the hub's set
    columns: Mapping[str, str] = Field(default_factory=dict[str, str])  # expected name -> the data's own
    drawn: DrawnPairs | None = None  # or drawn scenes
    # As in the section, for this set alone; None: what the section says.
    filter_ties: bool | None = None
    weight_by_prompt: bool | None = None
    pairs_per_prompt: Annotated[int, Field(ge=1)] | Literal["all"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_source(cls, values: Any) -> Any:
        return {"source": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _one_source(self) -> "PairsConfig":
        if (self.source is None) == (self.drawn is None):
            raise ValueError("give either source (a file, folder or hub id) or drawn (scenes drawn on demand)")
        if self.split is not None and self.source is None:
            raise ValueError(f"split={self.split!r} belongs to a source; drawn pairs have drawn.prompts")
        if self.columns and self.source is None:
            raise ValueError(f"columns={dict(self.columns)} belongs to a source; drawn pairs have none")
        return self

    def rules(self, section: PairFilter) -> PairFilter:
        """Return the section's rules with those that this set has of its own."""
        own = {name: getattr(self, name) for name in ("filter_ties", "weight_by_prompt", "pairs_per_prompt")}
        changes = {name: None if value == "all" else value for name, value in own.items() if value is not None}
        return section.model_copy(update=changes)


class ImageTextDataConfig(PairFilter):
    """Which pairs are trained on and validated with; the filters hold for each set that has none of its own."""

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
    train = read_pairs(data.train, data)
    validation = {name: read_pairs(pairs, data) for name, pairs in data.validation.items()}
    sets = {"train": train, **{f"validation {name}": pairs for name, pairs in validation.items()}}
    captions = list(dict.fromkeys(train.prompts))  # no others: a run may go on with another validation set
    built = build_model(model, captions, seed=seed)
    for pairs in sets.values():
        pairs.check_captions(built.caption_tokens, built.caption_lengths(pairs.prompts))
    notes = {f"{name}: {why}": count for name, pairs in sets.items() for why, count in pairs.notes.items()}
    found = {name: pairs.found for name, pairs in sets.items()}
    return Fitting(built, train, validation, notes, shows=show_pairs, found=found)


def build_model(config: ImageTextModelConfig, captions: list[str], *, seed: int) -> CLIPRewardModel:
    """Load or make the model.

    Args:
        config: Its section of the config.
        captions: What the tokenizer of a model made from nothing learns from.
        seed: Seeds its weights.

    Raises:
        RewardError: A pretrained model is missing or cannot be read.
    """
    if config.pretrained is not None and config.hidden_act is not None:
        backbone = load_clip_checkpoint(
            Path(config.pretrained), hidden_act=config.hidden_act, tokenizer=config.tokenizer, share=False
        )
    elif config.pretrained is not None:
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


def read_pairs(pairs: PairsConfig, section: PairFilter) -> ImagePreferences:
    """Look through a set of pairs.

    Args:
        pairs: Where it is, and its own filters.
        section: The others.

    Raises:
        DataError: Pairs are missing or bad, and the section does not say to leave bad ones out.
    """
    if pairs.drawn is not None:
        return ImagePreferences(draw_pairs(pairs.drawn), pairs.rules(section))
    rules = pairs.rules(section)
    return read_image_preferences(pairs.source or "", rules, split=pairs.split, columns=pairs.columns)


def _build(config: ImageTextRunConfig) -> Fitting:
    return build_image_text(config.model, config.data, seed=config.seed)


# Bad pairs: while they are errors none has been left out, so they may be skipped from there on.
_FREE: Final = ("data.validation", "data.on_bad_image", "data.on_bad_record")
IMAGE_TEXT: Final = RewardModelKind(ImageTextRunConfig, _build, free=_FREE)
