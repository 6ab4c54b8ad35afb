"""DeQAScore: technical image quality between 1 and 5, by a local vision-language model or one behind an endpoint."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.rewards.judge import ChatEndpoint, EndpointSettings, weigh_words
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.deqa import (
    ANSWER,
    LEVELS,
    QUESTION,
    REMOTE_CODE,
    DeQAScorer,
    expected_level,
    pad_to_square,
)
from tiltflow.scorers.preprocess import CLIP_MEAN
from tiltflow.types import Config

ONE_WORD: Final = f"{QUESTION} Answer with one word: {', '.join(LEVELS[:-1])} or {LEVELS[-1]}."
PUBLISHED: Final = "DeQA-Score"  # how the names of the published weights begin
ENDPOINT_OPTIONS: Final = ("api_key_env", "max_retries", "max_concurrent", "continue_answer", "min_mass")
DEFAULT_TIMEOUT: Final = 60.0  # seconds per request, where the reward's entry sets none


class DeQAOptions(Config):
    """Options of DeQAScore: `model` alone for a local model, with `base_url` for one behind an endpoint."""

    model: str | None = None  # local: a folder, or a hub repository in the cache; else its name at the endpoint
    prompt: str | None = None  # local: the whole text before the quality word, for a model without chat template
    base_url: str | None = None  # such as http://localhost:8000/v1
    api_key_env: str | None = None  # the environment variable that holds the key
    max_retries: int = Field(default=3, ge=0)
    max_concurrent: int = Field(default=8, ge=1)  # requests at once
    continue_answer: bool = False  # let the model continue the answer as the local one does: vLLM and SGLang can
    min_mass: float = Field(default=0.01, ge=0, le=1)  # the five words' least probability for an answer to count


class DeQAReward(PointwiseRewardModel):
    """Technical quality of images, 1 (bad) to 5 (excellent); the prompt is not read.

    `extra_info` holds the probabilities of the five words, excellent first.
    """

    required_fields = ("image",)
    Options = DeQAOptions
    needed_options = ("model",)
    option_packages = {"base_url": "openai"}  # noqa: RUF012  # a class attribute, as in the base

    @classmethod
    def published_weights(cls, options: DeQAOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return () if options.model is None or options.base_url else (WeightsFolder(options.model),)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the local model, or prepare the endpoint's client.

        Raises:
            RewardError: No model is named, options do not fit together, the model cannot be had, or the package
                openai or the key is missing.
        """
        super().__init__(config, accelerator)
        options: DeQAOptions = self.options
        if options.model is None:
            raise RewardError(
                f"reward {config.name!r}: model=None; name a vision-language model: a folder, a hub repository in the "
                f"cache, or one behind base_url; {REMOTE_CODE}"
            )
        self._judge: DeQAScorer | _RemoteJudge
        if options.base_url is None:
            self._judge = self._local_judge(options.model, options)
        else:
            self._judge = self._remote_judge(options.model, options.base_url, options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score PIL images."""
        probabilities = self._judge.rate(image)
        return RewardModelOutput(expected_level(probabilities), {"levels": probabilities.tolist()})

    def _local_judge(self, model: str, options: DeQAOptions) -> DeQAScorer:
        idle = sorted(options.model_fields_set.intersection(ENDPOINT_OPTIONS))
        if idle:
            raise RewardError(
                f"reward {self.config.name!r}: {idle[0]} is for an endpoint; give base_url, or leave it out"
            )
        folder = WeightsFolder(model)
        if folder.find() is None and model.rpartition("/")[2].startswith(PUBLISHED):
            raise RewardError(f"reward {self.config.name!r}: model={model!r} cannot be used here: {REMOTE_CODE}")
        return DeQAScorer.from_folder(folder.require(), prompt=options.prompt, device=self.device, dtype=self.dtype)

    def _remote_judge(self, model: str, base_url: str, options: DeQAOptions) -> "_RemoteJudge":
        if options.prompt is not None:
            raise RewardError(f"reward {self.config.name!r}: prompt is for a local model; leave out prompt or base_url")
        settings = EndpointSettings(
            base_url=base_url,
            model=model,
            api_key_env=options.api_key_env,
            timeout=self.config.timeout or DEFAULT_TIMEOUT,
            max_retries=options.max_retries,
        )
        return _RemoteJudge(ChatEndpoint(settings), options)


class _RemoteJudge:
    """A model behind an endpoint, asked about several images at once."""

    def __init__(self, endpoint: ChatEndpoint, options: DeQAOptions):
        self.endpoint = endpoint
        self.options = options

    def rate(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the probabilities of the five words, `[B, 5]`.

        Raises:
            RewardError: One image could not be rated; nothing is said about the others then.
        """
        with ThreadPoolExecutor(self.options.max_concurrent) as pool:
            rows = list(pool.map(self._rate_one, images))
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), len(LEVELS))

    def _rate_one(self, image: Image.Image) -> list[float]:
        red, green, blue = (int(255 * value) for value in CLIP_MEAN)
        square = pad_to_square(image.convert("RGB"), (red, green, blue))
        if self.options.continue_answer:
            logprobs = self.endpoint.first_token(square, QUESTION, answer=ANSWER)
        else:
            logprobs = self.endpoint.first_token(square, ONE_WORD)
        return weigh_words(logprobs, LEVELS, min_mass=self.options.min_mass)
