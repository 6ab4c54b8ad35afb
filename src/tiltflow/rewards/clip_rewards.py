"""PickScore, its rank within a group, CLIPScore and HPSv2 as rewards."""

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.rewards.base import GroupwiseRewardModel, RewardModelOutput, Weights
from tiltflow.rewards.scorer_reward import PointwiseScorerReward, ScorerOptions, ScorerReward
from tiltflow.scorers import ClipScorer
from tiltflow.scorers.checkpoints import WeightsFile, WeightsFolder
from tiltflow.scorers.clip import ClipScale
from tiltflow.scorers.clip_loading import TokenizerFiles
from tiltflow.types import Config, PathText, PathTextOrNone

HPS_FILES: Final = {
    "v2.0": WeightsFile("HPS_v2_compressed.pt", page="huggingface.co/xswu/HPSv2", repo="xswu/HPSv2"),
    "v2.1": WeightsFile("HPS_v2.1_compressed.pt", page="huggingface.co/xswu/HPSv2", repo="xswu/HPSv2"),
}


class PickScoreRankOptions(Config):
    """Options of the PickScore rank."""

    model_name_or_path: PathText = "yuvalkirstain/PickScore_v1"


class PickScoreOptions(PickScoreRankOptions):
    """Options of PickScore."""

    divisor: float = Field(default=26.0, gt=0)  # 1 gives the published scale, about 18 to 26


class ClipOptions(ScorerOptions):
    """Options of CLIPScore."""

    model_name_or_path: PathText = "openai/clip-vit-large-patch14"
    scale: ClipScale = "cosine"  # or logits: the cosine times about 100


class HPSv2Options(ScorerOptions):
    """Options of HPSv2."""

    version: Literal["v2.1", "v2.0"] = "v2.1"  # their scores cannot be compared
    antialias: bool = True  # False resizes as installations of 2023 did
    checkpoint: PathTextOrNone = None  # a file in place of the version's own
    tokenizer: PathTextOrNone = None  # folder or hub repository of CLIP's tokenizer; None looks for it


class PickScoreReward(PointwiseScorerReward):
    """PickScore divided by `divisor`."""

    Options = PickScoreOptions
    measures = "PickScore"

    @classmethod
    def published_weights(cls, options: PickScoreOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WeightsFolder(options.model_name_or_path),)

    def load_scorer(self, options: PickScoreOptions) -> ClipScorer:
        """Return the network."""
        return _pickscore(options, self)


class PickScoreRankReward(ScorerReward, GroupwiseRewardModel):
    """Rank by PickScore within the group, 0 the lowest, divided by the group's size.

    Equal scores share their mean rank.

    Example: scores 20, 22, 22, 21 of one prompt give 0, 2.5/4, 2.5/4 and 1/4. `extra_info` carries the scores.
    """

    Options = PickScoreRankOptions
    measures = "PickScore"  # made into ranks

    @classmethod
    def published_weights(cls, options: PickScoreRankOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WeightsFolder(options.model_name_or_path),)

    def load_scorer(self, options: PickScoreRankOptions) -> ClipScorer:
        """Return the network."""
        return _pickscore(options, self)

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


class ClipReward(PointwiseScorerReward):
    """CLIPScore, cosine or logits, divided by `divisor`."""

    Options = ClipOptions
    scale_options = ("divisor", "scale")

    @classmethod
    def published_weights(cls, options: ClipOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        return (WeightsFolder(options.model_name_or_path),)

    def load_scorer(self, options: ClipOptions) -> ClipScorer:
        """Return the network."""
        folder = WeightsFolder(options.model_name_or_path).require()
        return ClipScorer.from_pretrained(
            folder, kind="clip", scale=options.scale, device=self.device, dtype=self.dtype
        )


class HPSv2Reward(PointwiseScorerReward):
    """HPSv2 or HPSv2.1, a cosine of about 0.2 to 0.35 (published tables show it times 100), divided by `divisor`."""

    Options = HPSv2Options

    @classmethod
    def published_weights(cls, options: HPSv2Options) -> Sequence[Weights]:
        """Return what is loaded."""
        network = () if options.checkpoint else (HPS_FILES[options.version],)
        return (*network, TokenizerFiles(options.tokenizer))

    def load_scorer(self, options: HPSv2Options) -> ClipScorer:
        """Return the network."""
        return ClipScorer.from_open_clip(
            options.checkpoint or HPS_FILES[options.version].require(),
            kind="hpsv2",
            hidden_act="gelu",  # LAION's ViT-H/14, which HPSv2 was fitted from, has the exact one
            antialias=options.antialias,
            tokenizer=options.tokenizer,
            device=self.device,
            dtype=self.dtype,
        )


def mean_ranks(scores: Tensor) -> Tensor:
    """Return ranks from 0, the lowest, float32 `[K]`; equal scores share the mean of their ranks, NaN stays NaN.

    rank_i = #{j: s_j < s_i} + (#{j: s_j = s_i} - 1) / 2
    """
    below = (scores[None, :] < scores[:, None]).sum(dim=1)
    equal = (scores[None, :] == scores[:, None]).sum(dim=1)
    return (below + (equal - 1) / 2).float().masked_fill(scores.isnan(), torch.nan)


def _pickscore(options: PickScoreRankOptions, reward: ScorerReward) -> ClipScorer:
    folder = WeightsFolder(options.model_name_or_path).require()
    return ClipScorer.from_pretrained(folder, kind="pickscore", device=reward.device, dtype=reward.dtype)
