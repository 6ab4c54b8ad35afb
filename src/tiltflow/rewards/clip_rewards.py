"""PickScore, its rank within a group, CLIPScore and HPSv2 as rewards."""

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.rewards.base import (
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Weights,
)
from tiltflow.scorers import ClipScorer
from tiltflow.scorers.checkpoints import WeightsFile, WeightsFolder
from tiltflow.scorers.clip import ClipScale
from tiltflow.types import Config

HPS_FILES: Final = {
    "v2.0": WeightsFile("HPS_v2_compressed.pt", page="huggingface.co/xswu/HPSv2", repo="xswu/HPSv2"),
    "v2.1": WeightsFile("HPS_v2.1_compressed.pt", page="huggingface.co/xswu/HPSv2", repo="xswu/HPSv2"),
}


class PickScoreOptions(Config):
    """Options of PickScore."""

    model_name_or_path: str = "yuvalkirstain/PickScore_v1"
    divisor: float = Field(default=26.0, gt=0)  # 1 gives the published scale, about 18 to 26


class ClipOptions(Config):
    """Options of CLIPScore."""

    model_name_or_path: str = "openai/clip-vit-large-patch14"
    scale: ClipScale = "cosine"  # or logits: the cosine times about 100
    divisor: float = Field(default=1.0, gt=0)


class HPSv2Options(Config):
    """Options of HPSv2."""

    version: Literal["v2.1", "v2.0"] = "v2.1"  # their scores cannot be compared
    antialias: bool = True  # False resizes as installations of 2023 did
    checkpoint: str | None = None  # a file in place of the version's own
    tokenizer: str | None = None  # folder or hub repository of CLIP's tokenizer; None looks for it
    divisor: float = Field(default=1.0, gt=0)


class PickScoreRankOptions(Config):
    """Options of the PickScore rank."""

    model_name_or_path: str = "yuvalkirstain/PickScore_v1"


class PickScoreReward(PointwiseRewardModel):
    """PickScore divided by `divisor`; `extra_info` carries the score itself."""

    use_tensor_inputs = True
    Options = PickScoreOptions

    @classmethod
    def published_weights(cls, options: PickScoreOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WeightsFolder(options.model_name_or_path),)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the network, or share the one that is loaded.

        Raises:
            RewardError: The weights or the tokenizer are missing or do not fit.
        """
        super().__init__(config, accelerator)
        self.scorer = _pickscore(self.options.model_name_or_path, self)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score image tensors in [0, 1] against their prompts."""
        scores = self.scorer.score(image, prompt)
        return RewardModelOutput(scores / self.options.divisor, {"pickscore": scores.tolist()})


class PickScoreRankReward(GroupwiseRewardModel):
    """Rank by PickScore within the group, 0 the lowest, divided by the group's size.

    Equal scores share their mean rank.

    Example: scores 20, 22, 22, 21 of one prompt give 0, 2.5/4, 2.5/4 and 1/4. `extra_info` carries the scores.
    """

    use_tensor_inputs = True
    Options = PickScoreRankOptions

    @classmethod
    def published_weights(cls, options: PickScoreRankOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WeightsFolder(options.model_name_or_path),)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the network, or share the one that is loaded.

        Raises:
            RewardError: The weights or the tokenizer are missing or do not fit.
        """
        super().__init__(config, accelerator)
        self.scorer = _pickscore(self.options.model_name_or_path, self)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Rank the image tensors of one group, scored in batches of `batch_size`."""
        size = self.config.batch_size
        parts = [slice(start, start + size) for start in range(0, len(prompt), size)]
        scores = torch.cat([self.scorer.score(image[part], prompt[part]) for part in parts] or [torch.zeros(0)])
        return RewardModelOutput(mean_ranks(scores) / max(len(prompt), 1), {"pickscore": scores.tolist()})


class ClipReward(PointwiseRewardModel):
    """CLIPScore, cosine or logits, divided by `divisor`."""

    use_tensor_inputs = True
    Options = ClipOptions

    @classmethod
    def published_weights(cls, options: ClipOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WeightsFolder(options.model_name_or_path),)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the network, or share the one that is loaded.

        Raises:
            RewardError: The weights or the tokenizer are missing or do not fit.
        """
        super().__init__(config, accelerator)
        options: ClipOptions = self.options
        folder = WeightsFolder(options.model_name_or_path).require()
        self.scorer = ClipScorer.from_pretrained(
            folder, kind="clip", scale=options.scale, device=self.device, dtype=self.dtype
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score image tensors in [0, 1] against their prompts."""
        return RewardModelOutput(self.scorer.score(image, prompt) / self.options.divisor)


class HPSv2Reward(PointwiseRewardModel):
    """HPSv2 or HPSv2.1, a cosine of about 0.2 to 0.35 (published tables show it times 100), divided by `divisor`."""

    use_tensor_inputs = True
    Options = HPSv2Options

    @classmethod
    def published_weights(cls, options: HPSv2Options) -> Sequence[Weights]:
        """Return what is loaded."""
        return () if options.checkpoint else (HPS_FILES[options.version],)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the network, or share the one that is loaded.

        Raises:
            RewardError: The weights or the tokenizer are missing or do not fit.
        """
        super().__init__(config, accelerator)
        options: HPSv2Options = self.options
        self.scorer = ClipScorer.from_open_clip(
            options.checkpoint or HPS_FILES[options.version].require(),
            kind="hpsv2",
            hidden_act="gelu",  # LAION's ViT-H/14, which HPSv2 was fitted from, has the exact one
            antialias=options.antialias,
            tokenizer=options.tokenizer,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score image tensors in [0, 1] against their prompts."""
        return RewardModelOutput(self.scorer.score(image, prompt) / self.options.divisor)


def mean_ranks(scores: Tensor) -> Tensor:
    """Return ranks from 0, the lowest, float32 `[K]`; equal scores share the mean of their ranks, NaN stays NaN.

    rank_i = #{j: s_j < s_i} + (#{j: s_j = s_i} - 1) / 2
    """
    below = (scores[None, :] < scores[:, None]).sum(dim=1)
    equal = (scores[None, :] == scores[:, None]).sum(dim=1)
    return (below + (equal - 1) / 2).float().masked_fill(scores.isnan(), torch.nan)


def _pickscore(model: str, reward: PickScoreReward | PickScoreRankReward) -> ClipScorer:
    folder = WeightsFolder(model).require()
    return ClipScorer.from_pretrained(folder, kind="pickscore", device=reward.device, dtype=reward.dtype)
