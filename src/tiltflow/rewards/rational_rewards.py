"""Judges that rate aspects of an image from 1 to 4 along a rubric: of images made from text, and of edited images."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

import torch
from PIL import Image
from pydantic import Field

from tiltflow.errors import JudgeError, RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput
from tiltflow.rewards.crowd import do_all
from tiltflow.rewards.judge import RUNNING, ChatEndpoint, EndpointSettings, JudgeOptions
from tiltflow.rewards.rubric import EDIT_TASK, HIGHEST, LOWEST, SYSTEM, T2I_TASK, read_aspects, write_rubric
from tiltflow.rewards.wording import Rubric, fill

DEFAULT_TIMEOUT: Final = 180.0  # seconds per request, where the reward's entry sets none: the judge writes an essay

T2IAspect = Literal["text_faithfulness", "physical_quality", "text_rendering"]
EditAspect = Literal["text_faithfulness", "image_faithfulness", "physical_quality", "text_rendering"]
AtLeastOne = Field(min_length=1)


class RationalOptions(JudgeOptions):
    """Options of both rewards; a subclass names the model and the aspects."""

    max_concurrent: int = Field(default=8, ge=1, le=1000)
    max_retries: int = Field(default=5, ge=0)
    temperature: float = Field(default=0.1, ge=0)
    max_tokens: int = Field(default=2048, ge=1)
    rubric: Rubric | None = (
        None  # another question, {prompt} standing for the generation prompt; None: the built-in one
    )
    keep_reply: bool = False  # put the judge's text into extra_info


class RationalT2IOptions(RationalOptions):
    """Options of rational_rewards_t2i."""

    vlm_model: str = Field(default="RationalRewards-8B-T2I", min_length=1)
    aspects: Annotated[tuple[T2IAspect, ...], AtLeastOne] | None = None  # those that count; None: all


class RationalEditOptions(RationalOptions):
    """Options of rational_rewards_edit."""

    vlm_model: str = Field(default="RationalRewards-8B-Edit", min_length=1)
    aspects: Annotated[tuple[EditAspect, ...], AtLeastOne] | None = None  # those that count; None: all


@dataclass(frozen=True)
class _Sample:
    """What one request is about."""

    prompt: str
    image: Image.Image
    sources: Sequence[Image.Image]


@dataclass(frozen=True)
class _Judgement:
    """What one reply says."""

    reward: float
    scores: Mapping[str, float | None]  # aspect -> 1 to 4; None: does not apply
    text: str


class RationalReward(PointwiseRewardModel):
    """Asks a judge to rate each aspect from 1 to 4; the reward is (m - 1) / 3 with m the mean of the ratings.

    `extra_info` holds the ratings under the names of their aspects, and the judge's text as `reply` with `keep_reply`.
    """

    remote = True
    times_itself = True
    default_timeout = DEFAULT_TIMEOUT
    packages = ("openai",)
    running_options = RUNNING
    supported_aspects: ClassVar[tuple[str, ...]]
    default_rubric: ClassVar[str]

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Prepare the endpoint's client; nothing is sent yet.

        Raises:
            RewardError: The package openai or the key is missing, or the cache's folder cannot be used.
        """
        super().__init__(config, accelerator)
        self._own: Any = self.options
        self._aspects: tuple[str, ...] = self._own.aspects or self.supported_aspects
        settings = EndpointSettings.of(
            self._own,
            base_url=self._own.api_base_url,
            model=self._own.vlm_model,
            timeout=config.timeout or DEFAULT_TIMEOUT,
        )
        self._endpoint = ChatEndpoint(settings)

    @classmethod
    def call_seconds(cls, config: RewardArguments) -> float:
        """Return the time of one request for each image, `max_concurrent` of them at once."""
        options: Any = cls.Options.model_validate(dict(config.options))
        return options.seconds_for(config.batch_size, timeout=config.timeout or DEFAULT_TIMEOUT)

    @abstractmethod
    def pictures(self, image: Image.Image, sources: Sequence[Image.Image]) -> list[Image.Image]:
        """Return what the judge is shown of a sample, in the order that the rubric speaks of.

        Args:
            image: What was generated.
            sources: The sample's condition images.

        Raises:
            RewardError: A picture that is needed is not there.
        """

    def aggregate_aspect_scores(self, scores: Mapping[str, float | None]) -> float:
        """Return the reward that ratings make: (m - 1) / 3 in [0, 1], m being their mean. A subclass may do otherwise.

        Args:
            scores: Aspect -> rating in [1, 4], or None where it does not apply; those of the option `aspects` only.

        Raises:
            JudgeError: There is no rating at all.
        """
        rated = [score for score in scores.values() if score is not None]
        if not rated:
            raise JudgeError(f"the judge's answer rates none of {', '.join(scores)}: it says N/A of each")
        return (sum(rated) / len(rated) - LOWEST) / (HIGHEST - LOWEST)

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score PIL images; what the judge does not answer is a failure of that image alone."""
        sources = [()] * len(prompt) if condition_images is None else condition_images
        samples = [_Sample(*fields) for fields in zip(prompt, image, sources, strict=True)]
        done = do_all(self._judge, samples, at_once=self._own.max_concurrent)
        rewards = [math.nan if found is None else found.reward for found in done.results]
        info: dict[str, list[Any]] = {
            name: [None if found is None else found.scores[name] for found in done.results] for name in self._aspects
        }
        if self._own.keep_reply:
            info["reply"] = [None if found is None else found.text for found in done.results]
        return RewardModelOutput(torch.tensor(rewards, dtype=torch.float32), info, done.failures)

    def _judge(self, sample: _Sample) -> _Judgement:
        question = fill(self._own.rubric or self.default_rubric, sample.prompt)
        return self._endpoint.text(
            SYSTEM,
            [*self.pictures(sample.image, sample.sources), question],
            self._read,
            temperature=self._own.temperature,
            max_tokens=self._own.max_tokens,
        )

    def _read(self, text: str) -> _Judgement:
        scores = read_aspects(text, self._aspects)
        return _Judgement(self.aggregate_aspect_scores(scores), scores, text)


class RationalRewardT2I(RationalReward):
    """Rates an image made from text: does it show what was asked for, is it sound, is its text right?"""

    required_fields = ("prompt", "image")
    Options = RationalT2IOptions
    supported_aspects = get_args(T2IAspect)
    default_rubric = write_rubric(T2I_TASK, get_args(T2IAspect))

    def pictures(self, image: Image.Image, sources: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the image."""
        return [image]


class RationalRewardEdit(RationalReward):
    """Rates an edited image beside its source: also whether what should have stayed has stayed."""

    required_fields = ("prompt", "image", "condition_images")
    Options = RationalEditOptions
    supported_aspects = get_args(EditAspect)
    default_rubric = write_rubric(EDIT_TASK, get_args(EditAspect))

    def pictures(self, image: Image.Image, sources: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the source, which is the first condition image, and the edited image."""
        if not sources:
            raise RewardError("this sample has no condition image; the first one is the source that was edited")
        return [sources[0], image]
