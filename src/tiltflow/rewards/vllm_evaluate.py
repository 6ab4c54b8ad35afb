"""A yes/no question about an image, put to a vision-language model: the reward is how probable "yes" is."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import torch
from PIL import Image
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput
from tiltflow.rewards.crowd import do_all
from tiltflow.rewards.judge import (
    RUNNING,
    TOKENIZE_TIMEOUT,
    TOP_LOGPROBS,
    ChatEndpoint,
    EndpointSettings,
    JudgeOptions,
    NotOfferedError,
)
from tiltflow.rewards.labels import LabelTokens, check_absent, shares, spellings, token_masses, word_masses
from tiltflow.rewards.wording import Wording, asks_for_prompt, fill

DEFAULT_TIMEOUT: Final = 60.0  # seconds per request, where the reward's entry sets none
DEFAULT_QUESTION: Final = (
    "Look at this picture as a critical photo editor would. Consider whether light, shadows and perspective are "
    "natural, whether anything is distorted, smeared or broken, whether details are crisp, whether it is pleasing to "
    "look at, and whether all parts belong together. Is it a picture of high quality? Answer with one word: Yes or No."
)
YES, NO = "yes", "no"
EXACT: Final = {YES: ("Yes",), NO: ("No",)}


def _word(value: Any) -> Any:
    return ("auto" if value else "off") if isinstance(value, bool) else value  # YAML reads on and off as truth values


class VllmEvaluateOptions(JudgeOptions):
    """Options of vllm_evaluate."""

    vlm_model: str = Field(default="Qwen3-VL", min_length=1)
    max_concurrent: int = Field(default=100, ge=1, le=1000)
    max_retries: int = Field(default=10, ge=0)
    question: Wording = DEFAULT_QUESTION  # {prompt} stands for the generation prompt
    top_logprobs: int = Field(default=TOP_LOGPROBS, ge=1)  # tokens among which yes and no are looked for
    canonicalize: bool = True  # count spellings such as " yes" and "YES" too; false: "Yes" and "No" alone
    min_mass: float = Field(default=0.01, ge=0, le=1)  # of yes and no together, for an answer to count
    # How much higher or lower the reward may be for a label that is not among the likeliest tokens and counts as zero.
    max_uncertainty: float = Field(default=0.05, ge=0, le=1)
    # Ask for the labels' tokens directly, however improbable they are, if the server can tell them: auto, or off.
    label_tokens: Annotated[Literal["auto", "off"], BeforeValidator(_word)] = "auto"
    # Ask for these. They are two options because a mapping of yes and no would have truth values for keys: so YAML
    # reads the bare words.
    yes_token_ids: tuple[int, ...] = ()
    no_token_ids: tuple[int, ...] = Field(default=(), validate_default=True)

    @field_validator("no_token_ids")
    @classmethod
    def _check_labels(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        yes: tuple[int, ...] = info.data.get("yes_token_ids", ())
        if bool(yes) != bool(value):
            raise ValueError("give both yes_token_ids and no_token_ids, or neither")
        every = (*yes, *value)
        if len(set(every)) != len(every) or min(every, default=0) < 0:
            raise ValueError("every token counts once: yes and no must be different ids, none of them negative")
        return value


class VllmEvaluateReward(PointwiseRewardModel):
    """P(yes) / (P(yes) + P(no)) of the first token that a judge would answer to a question about the image.

    `extra_info` holds P(yes) + P(no) as `mass`: close to 1 when the judge understands the question.
    """

    required_fields = ("prompt", "image")
    remote = True
    times_itself = True
    default_timeout = DEFAULT_TIMEOUT
    Options = VllmEvaluateOptions
    packages = ("openai",)
    running_options = RUNNING

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Prepare the endpoint's client; nothing is sent yet.

        Raises:
            RewardError: The package openai or the key is missing, or the cache's folder cannot be used.
        """
        super().__init__(config, accelerator)
        self._own: VllmEvaluateOptions = self.options
        self.required_fields = self.fields_for(self._own)
        settings = EndpointSettings.of(
            self._own,
            base_url=self._own.api_base_url,
            model=self._own.vlm_model,
            timeout=config.timeout or DEFAULT_TIMEOUT,
        )
        self._endpoint = ChatEndpoint(settings)
        self._labels = LabelTokens(self._endpoint, _labels(self._own))

    @classmethod
    def fields_for(cls, options: VllmEvaluateOptions) -> tuple[str, ...]:
        """Return what the judge is told of: the image, and the prompt if the question has a place for it."""
        return cls.required_fields if asks_for_prompt(options.question) else ("image",)

    @classmethod
    def call_seconds(cls, config: RewardArguments) -> float:
        """Return the time of the requests for all images, twice where the first ones may turn out not to be offered."""
        options: Any = cls.Options.model_validate(dict(config.options))
        seconds = options.seconds_for(config.batch_size, timeout=config.timeout or DEFAULT_TIMEOUT)
        if options.yes_token_ids or options.label_tokens == "off":
            return seconds
        words = 1 + sum(map(len, _labels(options).values()))
        return words * TOKENIZE_TIMEOUT + 2 * seconds

    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score PIL images; what the judge does not answer is a failure of that image alone."""
        prompts = [""] * len(image) if prompt is None else prompt
        done = do_all(self._rate, list(zip(prompts, image, strict=True)), at_once=self._own.max_concurrent)
        rewards = [math.nan if pair is None else pair[0] for pair in done.results]
        masses = [None if pair is None else pair[1] for pair in done.results]
        return RewardModelOutput(torch.tensor(rewards, dtype=torch.float32), {"mass": masses}, done.failures)

    def _rate(self, sample: tuple[str, Image.Image]) -> tuple[float, float]:
        """Return the reward and the mass of both labels."""
        own = self._own
        prompt, image = sample
        content = [image, fill(own.question, prompt)]
        if own.yes_token_ids:
            return self._ask(content, {YES: own.yes_token_ids, NO: own.no_token_ids})
        tokens = self._labels.find() if own.label_tokens == "auto" else None
        if tokens is not None:
            try:
                return self._ask(content, tokens)
            except NotOfferedError as error:
                self._labels.give_up(error)
        return self._ask(content, {})

    def _ask(self, content: Sequence[Image.Image | str], tokens: Mapping[str, Sequence[int]]) -> tuple[float, float]:
        """Ask for the labels' tokens, or for the likeliest ones where none are given."""
        return self._endpoint.first_token(
            content,
            lambda logprobs: self._read(logprobs, tokens),
            top_logprobs=self._own.top_logprobs,
            token_ids=[token for label in (YES, NO) for token in tokens.get(label, ())],
        )

    def _read(self, logprobs: Mapping[str, float], tokens: Mapping[str, Sequence[int]]) -> tuple[float, float]:
        if tokens:
            masses = token_masses(logprobs, tokens)
        elif self._own.canonicalize:
            masses = word_masses(logprobs, (YES, NO))
        else:
            masses = {
                label: sum(math.exp(logprobs[word]) for word in words if word in logprobs)
                for label, words in EXACT.items()
            }
        reward, _ = shares(masses, logprobs, min_mass=self._own.min_mass)
        if not tokens:
            check_absent(masses, logprobs, _labels(self._own), max_uncertainty=self._own.max_uncertainty)
        return reward, sum(masses.values())


def _labels(options: VllmEvaluateOptions) -> Mapping[str, Sequence[str]]:
    """Return label -> the spellings of it that count."""
    return {label: spellings(label) for label in (YES, NO)} if options.canonicalize else EXACT
