"""The GenEval reward: a detector looks, `score_detections` judges."""

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput
from tiltflow.rewards.geneval import Detection, GenevalResult, score_detections
from tiltflow.types import Config, Prompt

# name -> "module:Class"; third parties write "package.module.Class".
DETECTORS: Mapping[str, str] = {"shapes": "tiltflow.demo.detector:ShapeDetector"}
UPCOMING_DETECTORS = ("mask2former",)  # known to configs, not yet part of the package


class Detector(Protocol):
    """Finds objects in images; made without arguments."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Detection]]:
        """Return the objects of each RGB image, uint8 `[H, W, 3]`."""
        ...


class GenevalOptions(Config):
    """Options of the GenEval reward."""

    detector: str = "mask2former"
    score: Literal["partial", "strict", "correct"] = "partial"
    quirks: Literal["clean", "reference"] = "clean"


class GenevalReward(PointwiseRewardModel):
    """Scores images by what a detector finds in them; the partial score is the usual training signal.

    Whatever is trained on, `extra_info` carries tag, official and strict correctness, partial score and reasons.
    """

    required_fields = ("image", "metadata")
    Options = GenevalOptions

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the detector.

        Raises:
            RewardError: There is no such detector.
        """
        super().__init__(config, accelerator)
        self._detector: Detector = detector_class(self.options.detector)()

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        """Check the metadata of a prompt.

        Raises:
            DataError: It is malformed.
        """
        score_detections([], prompt.metadata)

    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> RewardModelOutput:
        """Score PIL images against their prompts' metadata."""
        found = self._detector([np.asarray(item.convert("RGB")) for item in image])
        options: GenevalOptions = self.options
        results = [
            score_detections(objects, line, quirks=options.quirks)
            for objects, line in zip(found, metadata, strict=True)
        ]
        return RewardModelOutput([float(_pick(result, options.score)) for result in results], _extra(results, metadata))


def detector_class(name: str) -> Any:
    """Return the class of a detector, by built-in name or Python path.

    Raises:
        RewardError: There is no such detector.
    """
    if name in UPCOMING_DETECTORS:
        raise RewardError(
            f"detector={name!r} is not part of this version; use one of {', '.join(DETECTORS)} or the Python path of "
            "a class whose instances map uint8 RGB images to lists of Detection"
        )
    path = DETECTORS[name].replace(":", ".") if name in DETECTORS else name
    module, _, attribute = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, DETECTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"detector={name!r} is neither built in ({', '.join(DETECTORS)}) nor a Python path{hint}")
    try:
        contents = vars(import_module(module))
    except Exception as error:  # the user's module may fail in any way while it is imported
        raise RewardError(f"detector={name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if attribute not in contents:
        raise RewardError(f"detector={name!r} cannot be imported: {module} has no {attribute!r}")
    return contents[attribute]


def _pick(result: GenevalResult, score: Literal["partial", "strict", "correct"]) -> float | bool:
    return {"partial": result.partial, "strict": result.strict, "correct": result.correct}[score]


def _extra(results: Sequence[GenevalResult], metadata: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {
        "tag": [line["tag"] for line in metadata],
        "correct": [result.correct for result in results],
        "strict": [result.strict for result in results],
        "partial": [result.partial for result in results],
        "reasons": [list(result.reasons) for result in results],
    }
