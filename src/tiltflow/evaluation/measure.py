"""Measures a policy: images for the evaluation prompts, scored by the rewards.

The noise of an image depends only on the seed, its prompt's place in the list and its number, so two evaluations with
one config start from the same noise and their difference can be taken image by image.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from PIL.Image import Image as Picture
from PIL.Image import fromarray
from pydantic import Field
from torch import Tensor

from tiltflow.errors import ConfigError, DataError
from tiltflow.evaluation.results import EvaluationResult, EvaluationRow
from tiltflow.evaluation.summary import summarise
from tiltflow.policies.base import Policy
from tiltflow.rewards.engine import RewardEngine
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.plain import finite_or_none, plain
from tiltflow.training.rollout import SamplerConfig, rollout
from tiltflow.types import Config, Prompt, RewardTable, SampleBatch

_BATCHES_PER_CHUNK: Final = 4  # images in memory at a time, in batches of the sampler

Progress = Callable[[int, int], None]


class EvaluationConfig(Config):
    """How a checkpoint is measured; the sampler's settings are part of the measurement."""

    num_steps: int = Field(default=40, ge=1)
    guidance_scale: float = 4.5
    batch_size: int = Field(default=16, ge=1)
    images_per_prompt: int = Field(default=4, ge=1)
    max_prompts: int | None = Field(default=None, ge=1)  # None: all; fewer are chosen evenly over tags and list
    seed: int = 1234
    keep_images: int = Field(default=16, ge=0)  # how many images are written for the report

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler's own settings."""
        return SamplerConfig(num_steps=self.num_steps, guidance_scale=self.guidance_scale, batch_size=self.batch_size)


def evaluate(
    policy: Policy,
    engine: RewardEngine,
    prompts: Sequence[Prompt],
    *,
    config: EvaluationConfig,
    name: str,
    distributed: Distributed | None = None,
    progress: Progress = lambda done, total: None,
) -> EvaluationResult:
    """Generate images with the weights in use, score them, and summarise.

    Args:
        policy: The generator; entering `weights.using(...)` is up to the caller.
        engine: The rewards.
        prompts: The evaluation prompts; a prompt's noise depends on its place in this list only.
        config: Sampler and sizes.
        name: Of the result and of the folder of its pictures; letters, digits, `_`, `-` and `.`.
        distributed: Shares the prompts over its processes; every one of them returns the whole result.
        progress: Told (images done, images in total) of this process.

    Raises:
        ConfigError: The name is no file name, or two rewards share one once in lower case.
        DataError: There are no prompts.
        RewardError: A reward failed that must not.
    """
    _check(engine, prompts, name)
    chosen = choose_prompts(prompts, config.max_prompts)
    own = chosen if distributed is None else chosen[distributed.rank :: distributed.world_size]
    total = len(own) * config.images_per_prompt
    kept = _kept_images(prompts, chosen, config)
    per_chunk = max(1, _BATCHES_PER_CHUNK * config.batch_size // config.images_per_prompt)
    rows: list[EvaluationRow] = []
    pictures: dict[str, Picture] = {}
    with distributed.together() if distributed is not None else nullcontext():
        for start in range(0, len(own), per_chunk):
            groups = own[start : start + per_chunk]
            done = len(rows)
            with engine.begin(group_size=config.images_per_prompt) as scoring:
                samples = rollout(
                    policy,
                    [prompts[group] for group in groups],
                    groups=groups,
                    group_size=config.images_per_prompt,
                    sampler=config.sampler,
                    seed=(config.seed, "evaluation"),
                    progress=lambda images, _, done=done: progress(done + images, total),
                    submit=scoring.add_batch,
                )
                table = scoring.finish()
            shown = _pictures(samples, kept, name, config.images_per_prompt)
            pictures |= dict(shown.values())
            rows += [
                _row(samples, table, index, sample=index % config.images_per_prompt, image=shown.get(index, (None,))[0])
                for index in range(len(samples))
            ]
    if distributed is not None:
        rows, pictures = _of_all(distributed.gather((rows, pictures)))
    settings = {**config.model_dump(mode="json"), "prompts": len(chosen), "images": len(rows)}
    return EvaluationResult(name, settings, summarise(rows), rows, pictures)


def _of_all(
    parts: Sequence[tuple[list[EvaluationRow], dict[str, Picture]]],
) -> tuple[list[EvaluationRow], dict[str, Picture]]:
    """Return the rows of all processes, in the order of the prompts, and their pictures."""
    rows = sorted((row for own, _ in parts for row in own), key=lambda row: (row.group, row.sample))
    return rows, {place: picture for _, own in parts for place, picture in own.items()}


def _pictures(
    samples: SampleBatch, kept: set[tuple[int, int]], name: str, count: int
) -> dict[int, tuple[str, Picture]]:
    """Return the kept images with their paths beside the result file, by row."""
    places = [(group, index % count) for index, group in enumerate(samples.groups.tolist())]
    return {
        index: (f"{name}/{group:05d}_{sample:02d}.png", to_picture(samples.images[index]))
        for index, (group, sample) in enumerate(places)
        if (group, sample) in kept
    }


def choose_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[int]:
    """Return the indices of at most `limit` prompts, in order.

    Every GenEval tag gets the same number as long as it has that many, and within a tag they lie evenly spaced: the
    first prompts of a list would all be of its first tag.
    """
    if limit is None or limit >= len(prompts):
        return list(range(len(prompts)))
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(str(prompt.metadata.get("tag")), []).append(index)
    shares = dict.fromkeys(members, 0)
    while sum(shares.values()) < limit:
        open_tags = [tag for tag in members if shares[tag] < len(members[tag])]
        for tag in open_tags[: limit - sum(shares.values())]:
            shares[tag] += 1
    spaced = [[own[i * len(own) // shares[tag]] for i in range(shares[tag])] for tag, own in members.items()]
    return sorted(index for part in spaced for index in part)


def to_picture(image: Tensor) -> Picture:
    """Return the PIL image of `[3, H, W]` in [0, 1]."""
    pixels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return fromarray(pixels.cpu().contiguous().numpy())


def _check(engine: RewardEngine, prompts: Sequence[Prompt], name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ConfigError(f"evaluation name {name!r}: it becomes a file name; use letters, digits, '_', '-' and '.'")
    lower = [reward.lower() for reward in engine.names]
    if len(set(lower)) < len(lower):
        raise ConfigError(f"rewards {list(engine.names)}: two have one name in lower case; rename one")
    if not prompts:
        raise DataError("there are no evaluation prompts; give at least one")


def _kept_images(prompts: Sequence[Prompt], chosen: Sequence[int], config: EvaluationConfig) -> set[tuple[int, int]]:
    """Return the (group, sample) whose image is kept: first samples of prompts spread over the list, then seconds."""
    rounds, rest = divmod(min(config.keep_images, len(chosen) * config.images_per_prompt), len(chosen))
    kept = {(group, sample) for sample in range(rounds) for group in chosen}
    spread = choose_prompts([prompts[group] for group in chosen], rest) if rest else []
    return kept | {(chosen[index], rounds) for index in spread}


def _row(samples: SampleBatch, table: RewardTable, index: int, *, sample: int, image: str | None) -> EvaluationRow:
    scores = {name: finite_or_none(table.scores[index, column].item()) for column, name in enumerate(table.names)}
    info: dict[str, dict[str, Any]] = {}
    for name, cells in table.extra_info.items():
        info[name] = {key: plain(values[index]) for key, values in cells.items() if values[index] is not None}
    for failure in table.failures:
        if index in failure.samples:
            info.setdefault(failure.reward, {})["failure"] = f"{failure.kind}: {failure.message}"
    prompt, group = samples.prompts[index].text, int(samples.groups[index])
    return EvaluationRow(prompt, sample, group, scores, {name: cells for name, cells in info.items() if cells}, image)
