"""The GenEval reward: a detector looks, `score_detections` judges."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator

from tiltflow.errors import RewardError, exit_is_error
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput, Weights
from tiltflow.rewards.geneval import COLORS, Detection, GenevalResult, check_findable, colored_classes, score_detections
from tiltflow.runtime.pixels import to_rgb
from tiltflow.types import Config, PathText, PathTextOrNone, Prompt

# name -> "module:Class"; third parties write "package.module.Class".
DETECTORS: Mapping[str, str] = {
    "mask2former": "tiltflow.rewards.geneval_detector:Mask2FormerDetector",
    "shapes": "tiltflow.demo.detector:ShapeDetector",
}


class Detector(Protocol):
    """Finds objects in images; made without arguments."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Detection]]:
        """Return the objects of each RGB image, uint8 `[H, W, 3]`."""
        ...


class KnownClasses:
    """Base of a detector that tells what it can find, so that prompts which ask for more are refused beforehand."""

    classes: ClassVar[Sequence[str]]  # labels of its detections
    colors: ClassVar[Sequence[str]] = COLORS


class ColoringDetector(ABC):
    """A detector for which colours cost extra, so that it is told where they matter."""

    @abstractmethod
    def __call__(
        self, images: Sequence[NDArray[np.uint8]], *, colored: Sequence[Collection[str]] | None = None
    ) -> list[list[Detection]]:
        """Return the objects of each RGB image, uint8 `[H, W, 3]`.

        Args:
            images: B images.
            colored: For each image the classes whose objects get a colour; None: all.
        """


class GenevalOptions(Config):
    """Options of the GenEval reward; those after `quirks` belong to the detector `mask2former`."""

    detector: str = "mask2former"
    score: Literal["partial", "strict", "correct"] = "partial"
    quirks: Literal["clean", "reference"] = "clean"
    weights: PathTextOrNone = None  # file or folder; None: the published file in the models folder
    color_model: PathText = "openai/clip-vit-large-patch14"  # folder or hub name of a CLIP model
    resize: Literal["800px", "native"] = "800px"
    channels: Literal["rgb", "bgr"] = "rgb"
    detector_batch_size: int = Field(default=8, ge=1)  # images per forward pass

    @field_validator("weights", "color_model", "resize", "channels", "detector_batch_size")
    @classmethod
    def _only_with_mask2former(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse an option that would have no effect; runs for the options that are given."""
        detector = info.data.get("detector", "mask2former")  # absent when it is itself wrong, which is then the error
        if detector != "mask2former":
            raise ValueError(f"only the detector 'mask2former' has this option, not {detector!r}")
        return value


class GenevalReward(PointwiseRewardModel):
    """Scores images by what a detector finds in them; the partial score is the usual training signal.

    Whatever is trained on, `extra_info` carries tag, official and strict correctness, partial score and reasons.
    """

    required_fields = ("image", "metadata")
    Options = GenevalOptions
    running_options = ("detector_batch_size",)

    @classmethod
    def published_weights(cls, options: GenevalOptions) -> Sequence[Weights]:
        """Return what is loaded."""
        if options.detector != "mask2former" or options.weights:
            return ()
        # Only now: the drawn world's detector needs no networks.
        from tiltflow.scorers.checkpoints import FirstOf
        from tiltflow.scorers.geneval_color import COLOR_MODEL
        from tiltflow.scorers.mask2former import GENEVAL_WEIGHTS

        return (FirstOf(GENEVAL_WEIGHTS), COLOR_MODEL)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the detector.

        Raises:
            RewardError: There is no such detector, or its weights are missing or wrong.
        """
        super().__init__(config, accelerator)
        self._detector = self._build_detector()

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        """Check the metadata of a prompt.

        Raises:
            DataError: It is malformed.
        """
        score_detections([], prompt.metadata)

    @classmethod
    def prompt_check(cls, options: GenevalOptions) -> Callable[[Prompt], None]:
        """Return a check of the metadata that also refuses what the detector cannot find, if that says what it can.

        Raises:
            RewardError: There is no such detector.
        """
        detector = detector_class(options.detector)
        if not (isinstance(detector, type) and issubclass(detector, KnownClasses)):
            return cls.check_prompt
        known = detector

        def check(prompt: Prompt) -> None:
            cls.check_prompt(prompt)
            check_findable(prompt.metadata, classes=known.classes, colors=known.colors)

        return check

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
        found = self._find([np.asarray(to_rgb(item)) for item in image], metadata)
        options: GenevalOptions = self.options
        results = [
            score_detections(objects, line, quirks=options.quirks)
            for objects, line in zip(found, metadata, strict=True)
        ]
        return RewardModelOutput([float(_pick(result, options.score)) for result in results], _extra(results, metadata))

    def _find(
        self, images: Sequence[NDArray[np.uint8]], metadata: Sequence[Mapping[str, Any]]
    ) -> list[list[Detection]]:
        if isinstance(self._detector, ColoringDetector):
            return self._detector(images, colored=[colored_classes(line) for line in metadata])
        return self._detector(images)

    def _build_detector(self) -> Detector:
        options: GenevalOptions = self.options
        made = detector_class(options.detector)
        if options.detector != "mask2former":
            return made()
        return made(
            weights=options.weights,
            color_model=options.color_model,
            resize=options.resize,
            channels=options.channels,
            batch_size=options.detector_batch_size,
            device=self.device,
            dtype=self.dtype,
        )


def detector_class(name: str) -> Any:
    """Return the class of a detector, by built-in name or Python path.

    Raises:
        RewardError: There is no such detector.
    """
    path = DETECTORS[name].replace(":", ".") if name in DETECTORS else name
    module, _, attribute = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, DETECTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"detector={name!r} is neither built in ({', '.join(DETECTORS)}) nor a Python path{hint}")
    try:
        with exit_is_error():
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
