"""The package's own rewards, and those written for its protocol, as models of a server.

Importing this needs the whole package: everything else in this room must not import it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltflow import __version__
from tiltflow.errors import JudgeError
from tiltflow.rewards import GroupwiseRewardModel, RewardArguments, RewardModel, build_reward_model, reward_class
from tiltflow.rewards.passes import WrongLength, read_output
from tiltflow.serving.jobs import Sample, ScorerSource
from tiltflow.serving.server import to_levels
from tiltflow.serving.wire import ModelInfo, Pixels, WireError

T = TypeVar("T")

_BLOCK: Final = 2**20  # bytes that are hashed at once


def source_of(reward: RewardArguments) -> ScorerSource:
    """Return how a worker process makes a reward."""
    remote = reward_class(reward.reward_model).call_seconds(reward) is not None
    return ScorerSource(make_scorer, {"reward": reward.model_dump()}, borrows=True, remote=remote)


def make_scorer(reward: Mapping[str, Any]) -> "RewardScorer":
    """Build a reward from its entry, in a worker process.

    Raises:
        RewardError: It cannot be built.
    """
    arguments = RewardArguments.model_validate(reward)
    return RewardScorer(arguments, build_reward_model(arguments))


class RewardScorer:
    """A reward as a scorer."""

    def __init__(self, arguments: RewardArguments, model: RewardModel):
        """Keep a reward and what it was built from."""
        self._arguments = arguments
        self._model = model

    def describe(self) -> ModelInfo:
        """Return what `/v1/models` tells; the revision covers the entry and the weights' files."""
        return ModelInfo(
            name=self._arguments.name,
            revision=revision(self._arguments, self._model),
            preproc=f"tiltflow-{__version__}",
            dtype=self._arguments.dtype,
            groupwise=isinstance(self._model, GroupwiseRewardModel),
            pixels="float32" if self._model.use_tensor_inputs else "uint8",
            required_fields=self._model.required_fields,
            batch_size=self._arguments.batch_size,
        )

    def score(
        self, samples: Sequence[Sample]
    ) -> tuple[Sequence[float], Mapping[str, Sequence[Any]], Mapping[int, str | WireError]]:
        """Call the reward with the fields that it requires."""
        fields = {name: [self._value(sample, name) for sample in samples] for name in self._model.required_fields}
        try:
            with torch.no_grad():
                answer = read_output(self._model(**fields), len(samples))
        except WrongLength as error:
            raise WireError("wrong_count", str(error)) from error
        except JudgeError as error:
            raise WireError("upstream_judge", str(error)) from error
        told = {place: _told(error) for place, error in answer.failures.items()}
        return answer.scores.tolist(), answer.extra_info, told

    def _value(self, sample: Sample, name: str) -> Any:
        match name:
            case "prompt":
                return sample.prompt
            case "metadata":
                return dict(_there(sample.meta))
            case "image":
                return self._form(_there(sample.image))
            case "video":
                return self._form(_there(sample.video))
            case _:
                parts = sample.condition_images if name == "condition_images" else sample.condition_videos
                return self._parts([self._form(part) for part in parts or ()])

    def _form(self, array: Pixels) -> Any:
        """Return a picture `[3, H, W]` in [0, 1] or as PIL, a video as such a tensor with T in front or as a list."""
        if self._model.use_tensor_inputs:
            return to_tensor(array)
        if array.ndim == 4:
            return [self._form(frame) for frame in array]
        return Image.fromarray(to_levels(array))

    def _parts(self, parts: list[Any]) -> Any:
        """Return conditions as rewards get them: tensors of one size are stacked."""
        if parts and self._model.use_tensor_inputs and len({part.shape for part in parts}) == 1:
            return torch.stack(parts)
        return parts


def to_tensor(array: Pixels) -> Tensor:
    """Return a picture or video as float32 `[..., 3, H, W]` in [0, 1], in memory of its own."""
    if array.dtype == np.uint8:
        return torch.from_numpy(np.moveaxis(array, -1, -3).copy()).float() / 255
    return torch.from_numpy(array.copy())


def revision(arguments: RewardArguments, model: RewardModel) -> str:
    """Return a name for what scores: a hash of the entry, the version of this package and the weights' files."""
    digest = hashlib.sha256()
    entry = {"reward": arguments.reward_model, "dtype": arguments.dtype, "options": dict(arguments.options)}
    digest.update(json.dumps([entry, __version__], sort_keys=True, default=str).encode())
    for weights in model.published_weights(model.options):
        found = weights.find()
        for path in () if found is None else _files(found):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def _told(error: Exception) -> str | WireError:
    text = f"{type(error).__name__}: {error}"
    return WireError("upstream_judge", text) if isinstance(error, JudgeError) else text


def _there(value: T | None) -> T:
    if value is None:
        raise WireError("invalid_item", "a sample came without a field that the reward requires")
    return value
