"""A language reward model as a reward: the score of a text."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from tiltflow.errors import RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.types import Config


class LanguageRewardOptions(Config):
    """Options of the language reward."""

    model: str | None = None  # folder that `tiltflow train-reward` wrote, or a sequence classifier of the hub's cache
    max_length: int | None = Field(default=None, ge=1)  # tokens; None: what the network can read
    over_length: Literal["error", "truncate"] = "error"  # a longer text fails, or keeps its beginning
    mean: float = 0.0  # reward = (score - mean) / std
    std: float = Field(default=1.0, gt=0)
    chat_template_kwargs: Mapping[str, Any] | None = None  # such as {date_string: ...}; None: what training kept
    attn_implementation: str | None = None  # of transformers


class LanguageReward(PointwiseRewardModel):
    """The score of each prompt's text, by a trained language reward model; no picture is looked at.

    A text that is JSON of messages is a conversation for the model's chat template, and one that is a JSON object of
    `prompt` and `response` is made into what training made of such a pair. Any other is scored as it is.

    With several attributes the reward is their weighted sum, and `extra_info` holds each of them.
    """

    required_fields = ("prompt",)
    Options = LanguageRewardOptions
    needed_options = ("model",)

    @classmethod
    def published_weights(cls, options: LanguageRewardOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return () if options.model is None else (WeightsFolder(options.model),)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the model.

        Raises:
            RewardError: No model is named, or it cannot be loaded.
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
        rewards = (self.scorer.weighted(attributes) - options.mean) / options.std
        if count == 1:
            return RewardModelOutput(rewards, {}, failures)
        names = self.scorer.classifier.config.id2label
        info = {str(names[place]): attributes[:, place].tolist() for place in range(count)}
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


def _parsed(text: str, scorer: LanguageRewardModel) -> Any:
    """Return what a text stands for: a conversation, a prompt with its answer, or itself."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict) and value.keys() == {"prompt", "response"}:
        prompt, response = value["prompt"], value["response"]
        if isinstance(prompt, str) and isinstance(response, str):
            return scorer.pair(prompt, response)
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        return value
    return text
