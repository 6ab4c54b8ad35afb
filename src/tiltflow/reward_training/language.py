"""Language reward models while they are trained: ranking of pairs, and regression on ratings."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tiltflow.errors import ConfigError
from tiltflow.reward_training.base import Batch, Totals, TrainableRewardModel
from tiltflow.reward_training.language_config import LanguageModelConfig, RewardModelType
from tiltflow.reward_training.losses import (
    Sums,
    bradley_terry_metrics,
    bradley_terry_sums,
    masked_mse_metrics,
    masked_mse_sums,
)
from tiltflow.scorers import LanguageRewardModel


class LanguageTrainable(TrainableRewardModel):
    """What both kinds share: the network, its batches in buckets of similar length, and its folder."""

    def __init__(self, model: LanguageRewardModel, config: LanguageModelConfig):
        """Take a model to train, and how.

        Args:
            model: Of any number of attributes.
            config: Loss, buckets, checkpointing.
        """
        super().__init__()
        self.model = model
        self.config = config

    @property
    def blocks(self) -> Sequence[str]:
        """The network's layers, as transformers names them."""
        return sorted(self.model.classifier._no_split_modules or ())

    def attributes(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the attributes of texts padded on the right, float32 `[N, A]`, with gradient."""
        return self.model.score_rows(
            input_ids.to(self.model.device),
            lengths.to(self.model.device),
            buckets=self.config.length_buckets,
            overhead=self.config.bucket_overhead,
            # Processes that share weights wait for each other in every call of the network: all must make as many.
            steady=isinstance(self, FSDPModule),
        )

    def enable_gradient_checkpointing(self) -> None:
        """Compute the activations of each layer again in the backward pass."""
        with warnings.catch_warnings():  # its new name is not yet in every version that is supported
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
            self.model.classifier.gradient_checkpointing_enable({"use_reentrant": False})

    def save_pretrained(self, folder: Path) -> None:
        """Write a sequence classifier of transformers; with LoRA, which is merged there, also `adapter/`."""
        self.model.save_pretrained(folder)
        if self.model.has_lora:
            self.model.save_adapter(folder / "adapter")


class BinaryRankingRewardModel(LanguageTrainable):
    """Learns from pairs: `bradley_terry` on the rewards of the chosen and the rejected text.

    Batches have `chosen` and `rejected` (int64 `[B, S]`, padded on the right), `chosen_length` and `rejected_length`
    `[B]`, and maybe `label`, `margin` and `weight` `[B]`.
    """

    def __init__(self, model: LanguageRewardModel, config: LanguageModelConfig):
        """Take a model whose head gives one number.

        Raises:
            ConfigError: It gives several.
        """
        if not model.head.scalar:
            raise ConfigError(
                f"reward_model_type=binary_ranking needs one reward for a text, and the head gives "
                f"{model.head.num_attributes} attributes; set head.merge_attributes: true, or num_attributes: 1"
            )
        super().__init__(model, config)

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs that count."""
        return float((_weights(batch, "chosen_length") > 0).sum())

    def forward(self, batch: Batch) -> tuple[Tensor, Totals]:
        """Return the sum of the pairs' losses, and sums of which `metrics` makes the metrics."""
        width = max(batch["chosen"].shape[1], batch["rejected"].shape[1])
        ids = torch.cat([F.pad(batch[side], (0, width - batch[side].shape[1])) for side in ("chosen", "rejected")])
        lengths = torch.cat([batch["chosen_length"], batch["rejected_length"]])
        chosen, rejected = self.model.merged(self.attributes(ids, lengths)).chunk(2)
        given = {key: batch[key].to(chosen.device) for key in ("label", "margin") if key in batch}
        config = self.config
        loss, sums = bradley_terry_sums(
            chosen,
            rejected,
            weights=_weights(batch, "chosen_length").to(chosen.device),
            margin=given["margin"] if config.loss == "margin" else None,
            scale=given["margin"].abs() if config.loss == "scaled" else None,
            center_coefficient=config.center_rewards_coefficient,
            labels=given.get("label"),
            tie_threshold=config.tie_threshold,
        )
        return loss.float(), _totals(sums)

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Return `loss, acc, rewards_chosen_mean, rewards_rejected_mean, rewards_all_mean, rewards_all_std`."""
        return bradley_terry_metrics(totals)

    @property
    def metric_names(self) -> Sequence[str]:
        """The keys of `metrics`."""
        rewards = ("rewards_chosen_mean", "rewards_rejected_mean", "rewards_all_mean", "rewards_all_std")
        return ("loss", "acc", *rewards)


class RegressionRewardModel(LanguageTrainable):
    """Learns from ratings: `masked_mse` of the attributes.

    Batches have `inputs` (int64 `[B, S]`, padded on the right), `lengths` `[B]`, `labels` `[B, A]` with -100 where
    there is none, and maybe `weight` `[B]`.
    """

    def weight(self, batch: Batch) -> float:
        """Return the number of ratings that count."""
        _, sums = masked_mse_sums(batch["labels"], batch["labels"], weights=_weights(batch, "lengths"))
        return float(sums["labels"])

    def forward(self, batch: Batch) -> tuple[Tensor, Totals]:
        """Return the sum of squared errors, and sums of which `metrics` makes the metrics."""
        predictions = self.attributes(batch["inputs"], batch["lengths"])
        labels = batch["labels"].to(predictions.device)
        weights = _weights(batch, "lengths").to(predictions.device)
        loss, sums = masked_mse_sums(predictions, labels, weights=weights)
        return loss.float(), _totals(sums)

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Return `loss`, the mean squared error, and `mae`, the mean absolute one."""
        return masked_mse_metrics(totals)

    @property
    def metric_names(self) -> Sequence[str]:
        """The keys of `metrics`."""
        return ("loss", "mae")


REWARD_MODEL_CLASS_DICT: Mapping[RewardModelType, type[LanguageTrainable]] = {
    RewardModelType.BINARY_RANKING: BinaryRankingRewardModel,
    RewardModelType.REGRESSION: RegressionRewardModel,
}


def _weights(batch: Batch, like: str) -> Tensor:
    """Return which rows count, `[B]`; all, where the batch does not say."""
    return batch["weight"] if "weight" in batch else torch.ones_like(batch[like], dtype=torch.float32)


def _totals(sums: Sums) -> Totals:
    """Return sums as numbers; one transfer from the device for all."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
