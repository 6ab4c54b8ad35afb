"""A yes/no question about an image, put to a vision-language model: the reward is how probable "yes" is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator

from tiltflow.errors import JudgeError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput
from tiltflow.rewards.crowd import do_all
from tiltflow.rewards.judge import (
    TOKEN_ID,
    TOP_LOGPROBS,
    ChatEndpoint,
    EndpointSettings,
    JudgeOptions,
    shares,
    word_masses,
)
from tiltflow.rewards.wording import Wording, fill

DEFAULT_TIMEOUT: Final = 60.0  # seconds per request, where the reward's entry sets none
DEFAULT_QUESTION: Final = (
    "Look at this picture as a critical photo editor would. Consider whether light, shadows and perspective are "
    "natural, whether anything is distorted, smeared or broken, whether details are crisp, whether it is pleasing to "
    "look at, and whether all parts belong together. Is it a picture of high quality? Answer with one word: Yes or No."
)
YES, NO = "yes", "no"
EXACT: Final = {"Yes": YES, "No": NO}


class VllmEvaluateOptions(JudgeOptions):
    """Options of vllm_evaluate."""

    vlm_model: str = Field(default="Qwen3-VL", min_length=1)
    max_concurrent: int = Field(default=100, ge=1, le=1000)
    max_retries: int = Field(default=10, ge=0)
    question: Wording = DEFAULT_QUESTION  # {prompt} stands for the generation prompt
    top_logprobs: int = Field(default=TOP_LOGPROBS, ge=1)  # tokens among which yes and no are looked for
    canonicalize: bool = True  # count spellings such as " yes" and "YES" too; false: "Yes" and "No" alone
    min_mass: float = Field(default=0.01, ge=0, le=1)  # of yes and no together, for an answer to count
    # Ask for these tokens directly, however improbable they are. They are two options because a mapping of yes and no
    # would have truth values for keys: so YAML reads the bare words.
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
    Options = VllmEvaluateOptions
    packages = ("openai",)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Prepare the endpoint's client; nothing is sent yet.

        Raises:
            RewardError: The package openai or the key is missing, or the cache's folder cannot be used.
        """
        super().__init__(config, accelerator)
        self._own: VllmEvaluateOptions = self.options
        settings = EndpointSettings.of(
            self._own,
            base_url=self._own.api_base_url,
            model=self._own.vlm_model,
            timeout=config.timeout or DEFAULT_TIMEOUT,
        )
        self._endpoint = ChatEndpoint(settings)

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score PIL images; what the judge does not answer is a failure of that image alone."""
        done = do_all(self._rate, list(zip(prompt, image, strict=True)), at_once=self._own.max_concurrent)
        rewards = [math.nan if pair is None else pair[0] for pair in done.results]
        masses = [None if pair is None else pair[1] for pair in done.results]
        return RewardModelOutput(torch.tensor(rewards, dtype=torch.float32), {"mass": masses}, done.failures)

    def _rate(self, sample: tuple[str, Image.Image]) -> tuple[float, float]:
        prompt, image = sample
        return self._endpoint.first_token(
            [image, fill(self._own.question, prompt)],
            self._read,
            top_logprobs=self._own.top_logprobs,
            token_ids=(*self._own.yes_token_ids, *self._own.no_token_ids),
        )

    def _read(self, logprobs: Mapping[str, float]) -> tuple[float, float]:
        """Return the reward and the mass of both labels."""
        own = self._own
        if own.yes_token_ids:
            masses = {YES: _mass_of_ids(logprobs, own.yes_token_ids), NO: _mass_of_ids(logprobs, own.no_token_ids)}
        elif own.canonicalize:
            masses = word_masses(logprobs, (YES, NO))
        else:
            masses = {label: math.exp(logprobs[word]) if word in logprobs else 0.0 for word, label in EXACT.items()}
        reward, _ = shares(masses, logprobs, min_mass=own.min_mass)
        return reward, sum(masses.values())


def _mass_of_ids(logprobs: Mapping[str, float], ids: Sequence[int]) -> float:
    absent = [token for token in ids if f"{TOKEN_ID}{token}" not in logprobs]
    if absent:
        raise JudgeError(
            f"the judge did not tell the log-probability of token {absent[0]} but those of {list(logprobs)[:3]}; use a "
            "server that knows logprob_token_ids, or leave out yes_token_ids and no_token_ids"
        )
    return sum(math.exp(logprobs[f"{TOKEN_ID}{token}"]) for token in ids)
