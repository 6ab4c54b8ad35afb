"""The smallest reward model: a linear score of vectors, fitted to which of two is preferred."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tiltflow.errors import DataError
from tiltflow.reward_training.base import Batch, Examples, Fitting, Totals, TrainableRewardModel
from tiltflow.reward_training.fit_config import FitConfig, FitRunConfig, RewardModelConfig, RewardModelKind
from tiltflow.types import Config

TRUTH = torch.tensor([1.0, -2.0, 0.5, 0.0])


class LinearRewardModel(TrainableRewardModel):
    """score(x) = w . dropout(x); the loss is Bradley-Terry, weighted by each pair's weight."""

    def __init__(self, *, dropout: float = 0.0, hidden: int = 0, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = tuple(names)
        inner = [nn.Linear(4, hidden), nn.Tanh()] if hidden else []
        self.frozen = nn.Linear(4, 4)
        nn.init.eye_(self.frozen.weight)
        nn.init.zeros_(self.frozen.bias)
        self.frozen.requires_grad_(False)
        self.score = nn.Sequential(nn.Dropout(dropout), *inner, nn.Linear(hidden or 4, 1, bias=False))
        self.modes: list[str] = []

    def weight(self, batch: Batch) -> float:
        return batch["weights"].sum().item()

    def forward(self, batch: Batch) -> tuple[Tensor, Totals]:
        rewards = self.score(self.frozen(batch["vectors"])).squeeze(-1).float()  # [B, 2]
        margins, weights = rewards[:, 0] - rewards[:, 1], batch["weights"]
        loss = -(F.logsigmoid(margins) * weights).sum()
        right = ((margins > 0) * weights).sum()
        totals = {"loss": loss.item(), "right": right.item(), "weight": weights.sum().item()}
        return loss, totals

    def metrics(self, totals: Totals) -> dict[str, float]:
        weight = totals["weight"] or float("nan")
        return {"loss": totals["loss"] / weight, "acc": totals["right"] / weight}

    @property
    def metric_names(self) -> Sequence[str]:
        return self.names

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")

    def prepare_for_validation_step(self) -> None:
        super().prepare_for_validation_step()
        self.modes.append("validation")

    def finish_validation_step(self) -> None:
        super().finish_validation_step()
        self.modes.append("done")


class VectorPairs(Examples):
    """Pairs of vectors `[N, 2, 4]`, the preferred one first; odd weights, so that means are easy to get wrong."""

    def __init__(self, count: int, *, seed: int, bad: int | None = None, noise: float = 0.0) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.vectors = torch.randn(count, 2, 4, generator=draws)
        scores = self.vectors @ TRUTH + noise * torch.randn(count, 2, generator=draws)
        swap = scores[:, 0] < scores[:, 1]
        self.vectors[swap] = self.vectors[swap].flip(1)
        self.weights = 1.0 + (torch.arange(count) % 3)
        self.bad = bad

    @property
    def lengths(self) -> Sequence[int]:
        return [1 + index % 7 for index in range(len(self.vectors))]

    def __len__(self) -> int:
        return len(self.vectors)

    def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
        if self.bad in places:
            raise DataError(f"example {self.bad} cannot be read")
        rows = list(places)
        return {"vectors": self.vectors[rows], "weights": self.weights[rows] * torch.tensor(weights)}


class LinearConfig(RewardModelConfig):
    """What can be set about the model."""

    reward_model_type: Literal["tests.reward_training.linear.LINEAR"]
    dropout: float = 0.0
    hidden: int = 0
    names: tuple[str, ...] = ("loss", "acc")  # of metrics


class LinearData(Config):
    """What can be set about the data."""

    count: int = Field(default=45, ge=0)
    sets: tuple[str, ...] = ("all",)
    bad: int | None = None


class LinearFitConfig(FitConfig):
    """The settings that suit a linear model."""

    batch_size: int = Field(default=8, ge=1)
    lr: float = Field(default=0.05, gt=0)
    workers: int = Field(default=0, ge=0)


class LinearRunConfig(FitRunConfig):
    """A run that fits a linear model."""

    model: LinearConfig
    data: LinearData = LinearData()
    train: LinearFitConfig = LinearFitConfig()


def build_linear(config: LinearRunConfig) -> Fitting:
    torch.manual_seed(config.seed)
    return Fitting(
        LinearRewardModel(**config.model.model_dump(exclude={"reward_model_type"})),
        VectorPairs(config.data.count, seed=1, bad=config.data.bad),
        {name: VectorPairs(21, seed=2 + index, noise=index) for index, name in enumerate(config.data.sets)},
        {"ties": 3, "longer than 5 tokens, truncated": 2, "too_long": 0},
    )


LINEAR = RewardModelKind(LinearRunConfig, build_linear, free=("data.sets",))
NOT_A_KIND = json
