"""DeQAScore: technical image quality between 1 and 5, by a local vision-language model or one behind an endpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from PIL import Image
from pydantic import Field

from tiltflow.errors import RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.rewards.crowd import do_all
from tiltflow.rewards.judge import RUNNING, ChatEndpoint, EndpointOptions, EndpointSettings, Url
from tiltflow.rewards.labels import weigh_words
from tiltflow.runtime.pixels import to_rgb
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
from tiltflow.types import PathTextOrNone

ONE_WORD: Final = f"{QUESTION} Answer with one word: {', '.join(LEVELS[:-1])} or {LEVELS[-1]}."
PUBLISHED: Final = "DeQA-Score"  # how the names of the published weights begin
ENDPOINT_OPTIONS: Final = (*EndpointOptions.model_fields, "continue_answer", "min_mass")
DEFAULT_TIMEOUT: Final = 60.0  # seconds per request, where the reward's entry sets none


class DeQAOptions(EndpointOptions):
    """Options of DeQAScore: `model` alone for a local model, with `base_url` for one behind an endpoint."""

    model: PathTextOrNone = None  # local: a folder, or a hub repository in the cache; else its name at the endpoint
    prompt: str | None = None  # local: the whole text before the quality word, for a model without chat template
    base_url: Url | None = None  # such as http://localhost:8000/v1
    continue_answer: bool = False  # let the model continue the answer as the local one does: vLLM and SGLang can
    min_mass: float = Field(default=0.01, ge=0, le=1)  # the five words' least probability for an answer to count


class DeQAReward(PointwiseRewardModel):
    """Technical quality of images, 1 (bad) to 5 (excellent); the prompt is not read.

    `extra_info` holds the probabilities of the five words, excellent first.
    """

    required_fields = ("image",)
    times_itself = True  # with an endpoint; the constructor unsays it for a local model
    default_timeout = DEFAULT_TIMEOUT
    Options = DeQAOptions
    needed_options = ("model",)
    running_options = RUNNING  # not base_url: an endpoint is asked another question than a local model
    option_packages = {"base_url": "openai"}  # noqa: RUF012  # a class attribute, as in the base

    @classmethod
    def published_weights(cls, options: DeQAOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return () if options.model is None or options.base_url else (WeightsFolder(options.model),)

    @classmethod
    def call_seconds(cls, config: RewardArguments) -> float | None:
        """Return the time of one request for each image, `max_concurrent` at once; None for a local model."""
        options: Any = cls.Options.model_validate(dict(config.options))
        if options.base_url is None:
            return None
        return options.seconds_for(config.batch_size, timeout=config.timeout or DEFAULT_TIMEOUT)

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
        self.remote = self.times_itself = options.base_url is not None
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
        """Score PIL images; what a model behind an endpoint does not answer is a failure of that image alone."""
        if isinstance(self._judge, DeQAScorer):
            probabilities = self._judge.rate([to_rgb(each) for each in image])
            return RewardModelOutput(expected_level(probabilities), {"levels": probabilities.tolist()})
        done = do_all(self._judge.rate, image, at_once=self._judge.options.max_concurrent)
        none = [math.nan] * len(LEVELS)
        rows = torch.tensor([none if row is None else row for row in done.results], dtype=torch.float32)
        rewards = expected_level(rows.view(len(done.results), len(LEVELS)))
        return RewardModelOutput(rewards, {"levels": done.results}, done.failures)

    def _local_judge(self, model: str, options: DeQAOptions) -> DeQAScorer:
        if self.config.timeout is not None and not self.config.async_reward:
            raise RewardError(
                f"reward {self.config.name!r}: timeout={self.config.timeout:g} needs async_reward: true or base_url; a "
                "call of a local model in the main thread cannot be given up"
            )
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
        settings = EndpointSettings.of(
            options, base_url=base_url, model=model, timeout=self.config.timeout or DEFAULT_TIMEOUT
        )
        return _RemoteJudge(ChatEndpoint(settings), options)


class _RemoteJudge:
    """A model behind an endpoint."""

    def __init__(self, endpoint: ChatEndpoint, options: DeQAOptions):
        self.endpoint = endpoint
        self.options = options

    def rate(self, image: Image.Image) -> list[float]:
        """Return the probabilities of the five words.

        Raises:
            JudgeError: The model cannot be asked, or answers something else.
        """
        red, green, blue = (int(255 * value) for value in CLIP_MEAN)
        square = pad_to_square(to_rgb(image), (red, green, blue))
        if self.options.continue_answer:
            return self.endpoint.first_token([square, QUESTION], self._weigh, answer=ANSWER)
        return self.endpoint.first_token([square, ONE_WORD], self._weigh)

    def _weigh(self, logprobs: Mapping[str, float]) -> list[float]:
        return weigh_words(logprobs, LEVELS, min_mass=self.options.min_mass)
