"""What can be set of language reward models and their data."""

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from tiltflow.data.preferences import Layout
from tiltflow.data.records import OnBad
from tiltflow.errors import ConfigError
from tiltflow.reward_training.fit_config import FitRunConfig, LanguageFitConfig, RewardModelConfig
from tiltflow.reward_training.language_data import OverLength
from tiltflow.scorers import LoraSettings
from tiltflow.types import Config, in_home

RankingLoss = Literal["bradley_terry", "margin", "scaled"]
MAX_LENGTH: Final = 4096  # tokens, where the network can read as many


class RewardModelType(str, Enum):
    """What a language reward model learns from; the values of `reward_model_type`."""

    BINARY_RANKING = "binary_ranking"  # pairs of which one was preferred
    REGRESSION = "regression"  # ratings of attributes

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise ValueError(f"reward_model_type={value!r}: use one of {', '.join(each.value for each in cls)}")


class HeadConfig(Config):
    """The section `model.head`; what is left out is what the folder says, or the default of `RewardHead`."""

    num_attributes: int | None = Field(default=None, ge=1)
    attribute_names: tuple[str, ...] | None = None
    attribute_weights: tuple[float, ...] | None = None
    merge_attributes: bool | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    average_pooling: bool | None = None


class LanguageModelConfig(RewardModelConfig):
    """The section `model`."""

    reward_model_type: RewardModelType
    pretrained: Annotated[
        str, Field(min_length=1), AfterValidator(in_home)
    ]  # folder, or hub repository: a causal language model, classifier or adapter
    head: HeadConfig = HeadConfig()
    new_head: bool = False  # begin with a new head even if the folder has one
    lora: LoraSettings | None = None
    loss: RankingLoss = "bradley_terry"  # `margin` and `scaled` read the records' `margin`
    center_rewards_coefficient: float | None = Field(default=None, ge=0)  # 0.01 keeps rewards around zero
    tie_threshold: float | None = Field(default=None, gt=0)  # half the width of what people call a tie; None: p = 0.5
    append_eos: bool = False  # the tokenizer ends texts, but no conversations, with the end-of-text token
    dropout: bool = False  # keep the network's own
    attn_implementation: str | None = None  # of transformers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the network's weights
    length_buckets: int = Field(default=4, ge=1)  # calls of the network that one micro-batch is cut into, at most
    bucket_overhead: int = Field(default=64, ge=0)  # what a call costs beside its tokens, in tokens

    @model_validator(mode="after")
    def _losses_are_of_pairs(self) -> "LanguageModelConfig":
        own = {"loss": "bradley_terry", "center_rewards_coefficient": None, "tie_threshold": None}
        changed = [name for name, default in own.items() if self.__dict__[name] != default]  # a saved config has all
        if self.reward_model_type is RewardModelType.REGRESSION and changed:
            raise ValueError(f"{changed[0]} is for reward_model_type: binary_ranking; leave it out")
        return self


class LanguageDataConfig(Config):
    """The section `data`; sources are files, folders, or `owner/name@split` of the hub."""

    train: str | tuple[str, ...]
    validation: str | Mapping[str, str] | None = None  # one, or several by name
    layout: Layout = "auto"  # of pairs: two in a record, or adjacent lines
    columns: Mapping[str, str] = Field(default_factory=dict[str, str])  # expected name -> the data's own
    as_conversation: bool = False  # a prompt and an answer that are texts become messages for the chat template
    chat_template_kwargs: Mapping[str, Any] | None = None  # such as {date_string: ...}; None: what the folder says
    max_length: int | None = Field(default=None, ge=1)  # tokens; None: what the network can read, at most 4096
    over_length: OverLength = "filter"
    on_bad_record: OnBad = "error"
    label_range: tuple[float, float] | None = None  # of ratings, such as [0, 4]
    limit: Annotated[int, Field(ge=1)] | None = None  # training examples

    def check(self, kind: RewardModelType) -> None:
        """Check that every key has an effect on a kind of data.

        Raises:
            ConfigError: One is of the other kind.
        """
        other = {"layout": RewardModelType.BINARY_RANKING, "label_range": RewardModelType.REGRESSION}
        for name in sorted(other.keys() & self.model_fields_set):
            if other[name] is not kind and self.__dict__[name] not in (None, "auto"):
                raise ConfigError(f"data.{name} is for reward_model_type: {other[name].value}; leave it out")

    @property
    def train_sources(self) -> tuple[str, ...]:
        """The training sources."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def validation_sources(self) -> Mapping[str, str]:
        """The validation sources by name; a single one has the name ""."""
        if self.validation is None:
            return {}
        return {"": self.validation} if isinstance(self.validation, str) else self.validation


class LanguageRunConfig(FitRunConfig):
    """Everything that decides the training of a language reward model."""

    model: LanguageModelConfig
    data: LanguageDataConfig
    train: LanguageFitConfig = LanguageFitConfig()
