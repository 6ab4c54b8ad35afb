"""From the sections `model` and `data` of a config to what a training run is made of."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tiltflow.data.preferences import Preference, read_preferences
from tiltflow.data.ratings import Rating, read_ratings, unrated
from tiltflow.data.records import BadRecord, LeftOut
from tiltflow.errors import ConfigError, DataError
from tiltflow.reward_training.base import Examples, Fitting
from tiltflow.reward_training.fit_config import RewardModelKind
from tiltflow.reward_training.language import REWARD_MODEL_CLASS_DICT, LanguageTrainable
from tiltflow.reward_training.language_config import (
    MAX_LENGTH,
    LanguageDataConfig,
    LanguageModelConfig,
    LanguageRunConfig,
    RewardModelType,
)
from tiltflow.reward_training.language_data import PairExamples, RatingExamples, Tokenizing
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.language_text import check_length
from tiltflow.types import DTYPES


class _DataSet:
    """Reads the sources of one data set, and counts what it leaves out."""

    def __init__(self, name: str, trained: LanguageTrainable, data: LanguageDataConfig):
        self.name = name
        self._model = trained.model
        self._config = trained.config
        self._data = data
        self._left_out = LeftOut(data.on_bad_record)
        self._tokenizing = Tokenizing(
            trained.model,
            max_length=max_length(trained.model, data.max_length),
            over_length=data.over_length,
            left_out=self._left_out,
        )

    def read(self, sources: Sequence[str]) -> list[Preference] | list[Rating]:
        """Return what the sources hold: pairs, or ratings."""
        ranking = self._config.reward_model_type is RewardModelType.BINARY_RANKING
        return self._pairs(sources) if ranking else self._ratings(sources)

    def examples(self, found: Sequence[Any], sources: Sequence[str]) -> Examples:
        """Return what was read as tokens.

        Raises:
            DataError: Nothing is left.
        """
        ranking = self._config.reward_model_type is RewardModelType.BINARY_RANKING
        made = (PairExamples if ranking else RatingExamples)(
            found, self._tokenizing, pad=self._model.tokenizer.pad_token_id
        )
        if not len(made):
            causes = "; ".join(f"{kind}: {count}" for kind, count in self.notes.items())
            raise DataError(f"data {', '.join(sources)}: no example is left ({causes})")
        return made

    @property
    def notes(self) -> Counter[str]:
        """What was left out, or shortened, and how often."""
        counts = self._tokenizing.notes + Counter({f"{k}, left out": n for k, n in self._left_out.counts.items()})
        return Counter({f"{self.name}: {kind}": count for kind, count in sorted(counts.items())})

    def _pairs(self, sources: Sequence[str]) -> list[Preference]:
        data = self._data
        found: list[Preference] = []
        for source in sources:
            found += read_preferences(
                source,
                left_out=self._left_out,
                layout=data.layout,
                columns=data.columns,
                as_conversation=data.as_conversation,
            )
        return found if self._config.loss == "bradley_terry" else [each for each in found if self._has_margin(each)]

    def _ratings(self, sources: Sequence[str]) -> list[Rating]:
        head, data = self._model.head, self._data
        found: list[Rating] = []
        for source in sources:
            found += read_ratings(
                source,
                left_out=self._left_out,
                attributes=head.num_attributes,
                names=head.attribute_names,
                label_range=data.label_range,
                columns=data.columns,
                as_conversation=data.as_conversation,
            )
        return found

    def _has_margin(self, preference: Preference) -> bool:
        if preference.margin is None:
            problem = BadRecord("missing key", f"'margin', which loss: {self._config.loss} reads")
            self._left_out.bad(preference.place, problem)
        return preference.margin is not None


def build_language(
    model: LanguageModelConfig, data: LanguageDataConfig, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Fitting:
    """Load the model and read the data.

    Args:
        model: The section `model`.
        data: The section `data`.
        seed: Of a new head and of LoRA.
        device: Where the model goes.

    Raises:
        RewardError: The model cannot be loaded.
        ConfigError: The sections do not fit each other or the model.
        DataError: The data cannot be read, holds something wrong, or nothing of it is left.
    """
    data.check(model.reward_model_type)
    network = LanguageRewardModel.from_pretrained(
        model.pretrained,
        head=model.head.model_dump(exclude_none=True),
        new_head=model.new_head,
        seed=seed,
        append_eos=model.append_eos,
        dropout=model.dropout,
        attn_implementation=model.attn_implementation,
        device=device,
        dtype=DTYPES[model.dtype],
    )
    if model.lora is not None:
        network.add_lora(model.lora, seed=seed)
    if model.dtype == "bfloat16" and network.network is network.classifier:
        raise ConfigError(
            "model.dtype=bfloat16 without LoRA: it would round away most of what a step changes; leave it at float32 "
            "and compute in train.precision: bf16, or train LoRA (model.lora), whose weights stay in float32"
        )
    return _fitting(REWARD_MODEL_CLASS_DICT[model.reward_model_type](network, model), data)


def build_run(config: LanguageRunConfig) -> Fitting:
    """Do `build_language` for a whole config."""
    return build_language(config.model, config.data, seed=config.seed)


_FREE = ("data.validation",)
BINARY_RANKING = RewardModelKind(LanguageRunConfig, build_run, free=_FREE)
REGRESSION = RewardModelKind(LanguageRunConfig, build_run, free=_FREE)


def max_length(model: LanguageRewardModel, asked: int | None, *, name: str = "data.max_length") -> int:
    """Return how many tokens a text may have.

    Args:
        model: The model that reads it.
        asked: What the user wants; None: what the network can read, at most 4096.
        name: Of what the user set, for the message of an error.

    Raises:
        ConfigError: More are asked for than the network has positions.
    """
    check_length(asked, model.max_positions, option=name)
    return asked or min(model.max_positions or MAX_LENGTH, MAX_LENGTH)


def _fitting(trained: LanguageTrainable, data: LanguageDataConfig) -> Fitting:
    train = _DataSet("train", trained, data)
    found = train.read(data.train_sources)
    if missing := unrated(
        [each for each in found if isinstance(each, Rating)], trained.model.head.attribute_names or ()
    ):
        raise DataError(
            f"data.train: nothing is rated as {', '.join(missing)}; correct model.head.attribute_names, or say in "
            "data.columns how the data calls it"
        )
    found = found[: data.limit]
    remarks = _learn_format(trained, data, found)
    examples = train.examples(found, data.train_sources)
    notes = train.notes
    validation = {}
    for name, source in data.validation_sources.items():
        part = _DataSet(f"validation {name}".rstrip(), trained, data)
        held_out = part.read((source,))
        if _are_conversations(held_out) != _are_conversations(found):
            remarks.append(
                f"{part.name}: texts, or conversations, where training has the other; they are not comparable"
            )
        validation[name] = part.examples(held_out, (source,))
        notes.update(part.notes)
    return Fitting(trained, examples, validation, dict(notes), remarks=remarks)


def _learn_format(trained: LanguageTrainable, data: LanguageDataConfig, found: Sequence[Any]) -> list[str]:
    """Keep in a model's head how its training texts were made, for whoever makes others later; return remarks."""
    model = trained.model
    chat = _are_conversations(found)
    template = model.head.chat_template_kwargs if data.chat_template_kwargs is None else data.chat_template_kwargs
    model.head = model.head.model_copy(update={"as_conversation": chat, "chat_template_kwargs": dict(template)})
    remarks: list[str] = []
    if chat is None:
        remarks.append("train: both texts and conversations; the model does not keep which of them it is for")
    if chat is False and model.tokenizer.chat_template is not None:
        remarks.append(
            "train: the model has a chat template, and its texts do not go through it; data.as_conversation: true "
            "makes messages of a prompt and an answer"
        )
    if chat and model.texts.reads_clock((_text(each) for each in found), template):
        remarks.append(
            "the chat template writes today's date into every text, with which rewards change; set the date, as in "
            "data.chat_template_kwargs: {date_string: 26 Jul 2024} (the name is the template's)"
        )
    margins = sum(isinstance(each, Preference) and bool(each.margin) for each in found)
    if margins and trained.config.loss == "bradley_terry":
        remarks.append(f"train: {margins} pairs have a margin, which loss: bradley_terry leaves out; margin reads it")
    return remarks


def _are_conversations(found: Sequence[Any]) -> bool | None:
    """Return whether the texts of pairs or ratings are conversations; None if only some are, or there are none."""
    kinds = {not isinstance(_text(each), str) for each in found}
    return kinds.pop() if len(kinds) == 1 else None


def _text(each: Preference | Rating) -> Any:
    return each.chosen if isinstance(each, Preference) else each.text
