"""A language reward model as a reward: the score of a text."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from tiltflow.data.preferences import prompted
from tiltflow.data.records import BadRecord, text_field
from tiltflow.errors import RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.language_head import reward_attribute
from tiltflow.scorers.language_text import Text, check_length
from tiltflow.types import Config, PathTextOrNone


class LanguageRewardOptions(Config):
    """Options of the language reward."""

    model: PathTextOrNone = None  # folder that `tiltflow train-reward` wrote, or a classifier of the hub's cache
    max_length: int | None = Field(default=None, ge=1)  # tokens; None: what the network can read, which is the most
    over_length: Literal["error", "truncate"] = "error"  # a longer text fails, or keeps its beginning
    mean: float = 0.0  # reward = (score - mean) / std
    std: float = Field(default=1.0, gt=0)
    chat_template_kwargs: Mapping[str, Any] | None = None  # such as {date_string: ...}; None: what training kept
    attribute: str | int | None = None  # which of several numbers is the reward, its name or place; None: weighted sum
    attn_implementation: str | None = None  # of transformers


class LanguageReward(PointwiseRewardModel):
    """The score of each prompt's text, by a trained language reward model; no picture is looked at.

    A text that is JSON of messages is a conversation for the model's chat template, and one that is a JSON object of
    `prompt` and `response` is made into what training made of such a pair. One that is nearly so fails. Any other is
    scored as it is.

    With several attributes the reward is their weighted sum, or the one that is named, and `extra_info` holds each.
    """

    required_fields = ("prompt",)
    Options = LanguageRewardOptions
    scale_options = ("mean", "std")
    needed_options = ("model",)

    @classmethod
    def published_weights(cls, options: LanguageRewardOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return () if options.model is None else (WeightsFolder(options.model),)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the model.

        Raises:
            RewardError: No model is named, or it cannot be loaded.
            ConfigError: The network cannot read as much as `max_length`, or which number is the reward is not known.
        """
        super().__init__(config, accelerator)
        options: LanguageRewardOptions = self.options
        if options.model is None:
            raise RewardError(
                f"reward {config.name!r}: model=None; name a folder that `tiltflow train-reward` wrote, or a sequence "
                "classifier: a folder, or a hub repository in the cache"
            )
        self.scorer = LanguageRewardModel.from_pretrained(
            options.model,
            attn_implementation=options.attn_implementation,
            require_head=True,
            device=self.device,
            dtype=self.dtype,
        )
        check_length(options.max_length, self.scorer.max_positions, option=f"reward {config.name!r}: max_length")
        self._names = self.scorer.attribute_names
        asked = None if options.attribute is None else str(options.attribute)
        self._column = reward_attribute(self.scorer.head, self._names, asked, option="attribute")
        if options.chat_template_kwargs is not None:
            template = {"chat_template_kwargs": dict(options.chat_template_kwargs)}
            self.scorer.head = self.scorer.head.model_copy(update=template)
        self.scorer.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score texts; one that is too long, or has no tokens, is a failure of its own."""
        options: LanguageRewardOptions = self.options
        limit = options.max_length or self.scorer.max_positions
        rows: dict[int, list[int]] = {}
        failures: dict[int, Exception] = {}
        for place, text in enumerate(prompt):
            try:
                rows[place] = self._checked(self.scorer.encode(_parsed(text, self.scorer)), limit)
            except RewardError as error:
                failures[place] = error
        count = self.scorer.head.num_attributes
        attributes = torch.full((len(prompt), count), math.nan, device=self.device)
        attributes[list(rows)] = self.scorer.attributes(list(rows.values()))
        scores = self.scorer.weighted(attributes) if self._column is None else attributes[:, self._column]
        rewards = (scores - options.mean) / options.std
        if count == 1:
            return RewardModelOutput(rewards, {}, failures)
        info = {name: attributes[:, place].tolist() for place, name in enumerate(self._names)}
        return RewardModelOutput(rewards, info, failures)

    def _checked(self, tokens: list[int], limit: int | None) -> list[int]:
        if limit is None or len(tokens) <= limit:
            return tokens
        if self.options.over_length == "truncate":
            return self.scorer.shortened(tokens, limit)
        raise RewardError(
            f"the text has {len(tokens)} tokens, more than {limit}; shorten it, raise max_length, or set "
            "over_length: truncate"
        )


def _parsed(text: str, scorer: LanguageRewardModel) -> Text:
    """Return what a text stands for: a conversation, a prompt with its answer, or itself.

    Raises:
        RewardError: It is nearly a conversation, or nearly a prompt with its answer.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    try:
        if isinstance(value, dict) and {"prompt", "response"} <= value.keys():
            return _pair(value, scorer)
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return text_field({"the text": value}, "the text")
    except BadRecord as problem:
        raise RewardError(
            f"the text is JSON, but neither messages nor a prompt with its response; {problem}; correct it"
        ) from problem
    return text


def _pair(value: Mapping[str, Any], scorer: LanguageRewardModel) -> Text:
    """Return a prompt and its response as training puts them together.

    Raises:
        BadRecord: It cannot.
    """
    if more := sorted(value.keys() - {"prompt", "response"}):
        raise BadRecord("other keys", ", ".join(more))
    prompt, response = text_field(value, "prompt"), text_field(value, "response")
    if isinstance(prompt, str) and isinstance(response, str):
        return scorer.pair(prompt, response)
    return prompted(value, "response", as_conversation=True)
