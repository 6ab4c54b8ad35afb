"""The part of `tiltflow evaluate-reward` for image-text reward models: pairs of images, of which people prefer one."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress

from tiltflow.commands.reward_results import RewardOutcome, source_names
from tiltflow.config import parse_value, validate
from tiltflow.data.image_preferences import ImagePreferences, PairFilter
from tiltflow.data.records import OnBad
from tiltflow.errors import ConfigError
from tiltflow.evaluation.pair_bench import PairRewards, pair_bench, pair_content, pair_table
from tiltflow.reward_training.base import Batch
from tiltflow.reward_training.image_text import CLIPRewardModel, Precision, get_reward_model
from tiltflow.reward_training.image_text_fit import PairsConfig, read_pairs
from tiltflow.reward_training.thresholds import pair_rewards
from tiltflow.rewards.base import auto_device
from tiltflow.types import Config

BATCH = 64  # pairs that are decoded and scored at once
PRECISION: Mapping[str, Precision] = {"float32": "fp32", "bfloat16": "bf16"}


class PairEvaluation(Config):
    """What can be chosen for an image-text model."""

    validation: str | None = None  # the pairs that choose the threshold below which a pair is called a tie
    on_bad_image: OnBad = "error"


def evaluate_pairs(
    model: str,
    data: Sequence[str],
    settings: PairEvaluation,
    *,
    on_bad_record: OnBad,
    dtype: Literal["float32", "bfloat16"],
) -> RewardOutcome:
    """Do the work of `run_reward_evaluation` for an image-text model."""
    rules = PairFilter(on_bad_record=on_bad_record, on_bad_image=settings.on_bad_image)
    if settings.validation in data:
        raise ConfigError(f"--validation {settings.validation} is measured too; choose the threshold on other pairs")
    sets = {name: _read(text, rules) for name, text in zip(source_names(data), data, strict=True)}
    held = None if settings.validation is None else _read(settings.validation, rules)
    network = get_reward_model(
        {"pretrained": model, "precision": PRECISION[dtype], "device": auto_device()}, mbs=2 * BATCH, gbs=2 * BATCH
    )
    for pairs in [*sets.values(), *([held] if held is not None else [])]:
        pairs.check_captions(network.caption_tokens, network.caption_lengths(pairs.prompts))
    rows, notes = list[dict[str, Any]](), dict[str, int]()

    def scored(name: str, pairs: ImagePreferences) -> PairRewards:
        rewards = _scores(network, name, pairs)
        rows.extend(_rows(name, rewards))
        left_out = pairs.notes + Counter({"a reward that is not finite": rewards.failures})
        notes.update({f"{name}: {_told(why)}": count for why, count in left_out.items()})
        return rewards

    validation = None if held is None else scored("--validation", held)
    found = pair_bench({name: scored(name, pairs) for name, pairs in sets.items()}, validation)
    content = {"validation_data": settings.validation, **pair_content(found)}
    return RewardOutcome(pair_table(found), content, rows, notes)


def _told(why: str) -> str:
    """Return why pairs were left out, or shortened, in so many words."""
    return why if ", " in why else f"{why}, left out"


class _Watched:
    """Pairs that move a progress bar when they are read, and keep the prompts of those used; satisfies `Examples`."""

    def __init__(self, pairs: ImagePreferences, bar: Progress, task: Any):
        self.lengths = pairs.lengths
        self._pairs = pairs
        self._advance = bar.advance
        self._task = task
        self.prompts: list[str] = []

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, places: Sequence[int], weights: Sequence[float]) -> Batch:
        self._advance(self._task, len(places))
        batch = self._pairs.batch(places, weights)
        used = zip(batch["prompt"], batch["weight"].tolist(), strict=True)
        self.prompts += [prompt for prompt, weight in used if weight > 0]
        return batch


def _read(text: str, rules: PairFilter) -> ImagePreferences:
    """Open the pairs that a source, or a mapping such as `{source: ..., split: ...}`, names."""
    values = parse_value("data", text) if text.startswith("{") else text
    return read_pairs(validate(PairsConfig, values, source=text), rules)


def _scores(network: CLIPRewardModel, name: str, pairs: ImagePreferences) -> PairRewards:
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        watched = _Watched(pairs, bar, bar.add_task(f"pairs of {name}", total=len(pairs)))
        first, second, labels = pair_rewards(network, watched, batch_size=BATCH)
    return PairRewards(first, second, labels, np.asarray(watched.prompts))


def _rows(name: str, rewards: PairRewards) -> list[dict[str, Any]]:
    columns = (rewards.prompts, rewards.first, rewards.second, rewards.labels[:, 0], rewards.labels[:, 1])
    names = ("prompt", "reward_0", "reward_1", "label_0", "label_1")
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [{"set": name, **dict(zip(names, row, strict=True))} for row in values]
