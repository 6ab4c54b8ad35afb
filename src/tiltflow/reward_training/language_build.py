"""From the sections `model` and `data` of a config to what a training run is made of."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiltflow.data.preferences import Preference, read_preferences
from tiltflow.data.ratings import Rating, read_ratings
from tiltflow.data.records import BadRecord, LeftOut
from tiltflow.errors import ConfigError, DataError
from tiltflow.reward_training.base import Examples, Fitting
from tiltflow.reward_training.fit_config import RewardModelKind
from tiltflow.reward_training.language import REWARD_MODEL_CLASS_DICT, RewardModelType
from tiltflow.reward_training.language_config import (
    MAX_LENGTH,
    LanguageDataConfig,
    LanguageModelConfig,
    LanguageRunConfig,
)
from tiltflow.reward_training.language_data import PairExamples, RatingExamples, Tokenizing
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.language_head import DTYPES


class _DataSet:
    """Reads the sources of one data set, and counts what it leaves out."""

    def __init__(self, name: str, model: LanguageRewardModel, config: LanguageModelConfig, data: LanguageDataConfig):
        self.name = name
        self._model = model
        self._config = config
        self._data = data
        self._left_out = LeftOut(data.on_bad_record)
        self._tokenizing = Tokenizing(
            model, max_length=max_length(model, data.max_length), over_length=data.over_length, left_out=self._left_out
        )

    def pairs(self, sources: Sequence[str], limit: int | None) -> Examples:
        """Return the pairs of the sources as tokens."""
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
        if self._config.loss != "bradley_terry":
            found = [each for each in found if self._has_margin(each)]
        found = found[:limit]
        return self._some(PairExamples(found, self._tokenizing, pad=self._model.tokenizer.pad_token_id), sources)

    def ratings(self, sources: Sequence[str], limit: int | None) -> Examples:
        """Return the ratings of the sources as tokens."""
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
            )
        found = found[:limit]
        return self._some(RatingExamples(found, self._tokenizing, pad=self._model.tokenizer.pad_token_id), sources)

    @property
    def notes(self) -> Counter[str]:
        """What was left out, or shortened, and how often."""
        counts = self._tokenizing.notes + Counter({f"{k}, left out": n for k, n in self._left_out.counts.items()})
        return Counter({f"{self.name}: {kind}": count for kind, count in sorted(counts.items())})

    def _has_margin(self, preference: Preference) -> bool:
        if preference.margin is None:
            problem = BadRecord("missing key", f"'margin', which loss: {self._config.loss} reads")
            self._left_out.bad(preference.place, problem)
        return preference.margin is not None

    def _some(self, examples: Any, sources: Sequence[str]) -> Examples:
        if not len(examples):
            causes = "; ".join(f"{kind}: {count}" for kind, count in self.notes.items())
            raise DataError(f"data {', '.join(sources)}: no example is left ({causes})")
        return examples


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
    network = LanguageRewardModel.from_pretrained(
        model.pretrained,
        head=model.head.model_dump(exclude_none=True),
        new_head=model.new_head,
        seed=seed,
        append_eos=model.append_eos,
        dropout=model.dropout,
        attention=model.attention,
        device=device,
        dtype=DTYPES[model.dtype],
    )
    if model.lora is not None:
        network.add_lora(model.lora, seed=seed)
    kind = RewardModelType(model.reward_model_type)
    trained = REWARD_MODEL_CLASS_DICT[kind](network, model)
    reads = _DataSet.pairs if kind is RewardModelType.BINARY_RANKING else _DataSet.ratings
    return _fitting(trained, reads, data, network)


def build_run(config: LanguageRunConfig) -> Fitting:
    """Do `build_language` for a whole config."""
    return build_language(config.model, config.data, seed=config.seed)


BINARY_RANKING = RewardModelKind(LanguageRunConfig, build_run)
REGRESSION = RewardModelKind(LanguageRunConfig, build_run)


def max_length(model: LanguageRewardModel, asked: int | None, *, name: str = "data.max_length") -> int:
    """Return how many tokens a text may have.

    Args:
        model: The model that reads it.
        asked: What the user wants; None: what the network can read, at most 4096.
        name: Of what the user set, for the message of an error.

    Raises:
        ConfigError: More are asked for than the network has positions.
    """
    positions = model.max_positions or MAX_LENGTH
    if asked is not None and asked > positions:
        raise ConfigError(f"{name}={asked}: the network reads at most {positions} tokens")
    return asked or min(positions, MAX_LENGTH)


def _fitting(
    trained: Any,
    reads: Callable[[_DataSet, Sequence[str], int | None], Examples],
    data: LanguageDataConfig,
    network: LanguageRewardModel,
) -> Fitting:
    notes: Counter[str] = Counter()
    train = _DataSet("train", network, trained.config, data)
    examples = reads(train, data.train_sources, data.limit)
    notes.update(train.notes)
    validation = {}
    for name, source in data.validation_sources.items():
        part = _DataSet(f"validation {name}".rstrip(), network, trained.config, data)
        validation[name] = reads(part, (source,), None)
        notes.update(part.notes)
    return Fitting(trained, examples, validation, dict(notes))
