"""The OCR reward: does the image show the text that the prompt puts in double quotes?

The score is that of flow_grpo's `ocr.py` (text recognised with some confidence, edit distance capped at the length of
the target), read by RapidOCR instead of PaddleOCR. Where flow_grpo gives 0 for an image that could not be read or stops
with an IndexError or ZeroDivisionError, this reward raises an error that says why.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from tiltflow.errors import RewardError
from tiltflow.rewards.base import PointwiseRewardModel, RewardArguments, RewardModelOutput
from tiltflow.runtime.pixels import to_rgb
from tiltflow.types import Config, Prompt

# The models of RapidOCR 3.10's wheel. They are named here so that another version, whose scores would be others, or a
# damaged install is an error instead of a download.
DETECTION_MODEL: Final = "PP-OCRv6_det_small.onnx"
RECOGNITION_MODEL: Final = "PP-OCRv6_rec_small.onnx"


class Piece(NamedTuple):
    """One recognised piece of text.

    Example: `Piece("OPEN 24", 0.93)`.
    """

    text: str
    confidence: float  # in [0, 1]


def quoted_text(prompt: str) -> str:
    """Return what stands in the first pair of ASCII double quotes, up to the end if the pair is not closed.

    Raises:
        RewardError: There are no such quotes, or only spaces in them; names the prompt.
    """
    parts = prompt.split('"', 2)
    if len(parts) == 1:
        raise RewardError(
            f"prompt={prompt!r} has no ASCII double quotes, so the OCR reward does not know which text to look for; "
            'put the text into quotes, as in: a sign that says "OPEN"'
        )
    if not _bare(parts[1]):
        raise RewardError(f"prompt={prompt!r} has no text in its first double quotes; write the wanted text there")
    return parts[1]


def joined_text(pieces: Sequence[Piece]) -> str:
    """Return the pieces of positive confidence in their order, without anything between them."""
    return "".join(piece.text for piece in pieces if piece.confidence > 0)


def ocr_score(prompt: str, pieces: Sequence[Piece]) -> float:
    """Return how much of the prompt's quoted text was recognised: 1 - min(d, n) / n.

    n is the length of the target; d is 0 when the recognised text contains it, else their Levenshtein distance. Both
    sides are compared in lower case and without spaces; everything else, punctuation included, counts.

    Args:
        prompt: Has the target in its first pair of ASCII double quotes.
        pieces: What was recognised, in reading order; none if the image shows no text.

    Returns:
        A score in [0, 1].

    Raises:
        RewardError: The prompt has no target.

    Source: flow_grpo `ocr.py`.
    """
    from rapidfuzz.distance import Levenshtein

    target, recognised = _bare(quoted_text(prompt)), _bare(joined_text(pieces))
    if target in recognised:
        return 1.0
    return 1 - min(Levenshtein.distance(recognised, target), len(target)) / len(target)


class OCROptions(Config):
    """Options of the OCR reward; the defaults were chosen by measurement (`benchmarks/ocr.py`)."""

    detection_side: int = Field(default=320, ge=32)  # images whose longer side is longer are shrunk to find text
    workers: int = Field(default=2, ge=1)  # recognisers that read at the same time, one thread each
    upscale: int = Field(default=1, ge=1)  # enlarge images so many times (nearest pixel) before they are read


class OCRReward(PointwiseRewardModel):
    """Scores images by the text that RapidOCR reads in them; `extra_info` carries what it read.

    The recognisers run on the CPU whatever `device` says, and need no network: their models are in RapidOCR's wheel.
    """

    required_fields = ("prompt", "image")
    Options = OCROptions
    packages = ("rapidocr", "onnxruntime", "rapidfuzz")
    running_options = ("workers",)
    cpu_only = True

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        """Check that a prompt has a text in double quotes.

        Raises:
            RewardError: It has none, or an empty one.
        """
        quoted_text(prompt.text)

    def __init__(self, config: RewardArguments, accelerator: Any = None):
        """Load the recognisers.

        Raises:
            RewardError: RapidOCR is not installed, or is another version than 3.10.
        """
        super().__init__(config, accelerator)
        self._load()

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score PIL images against the text in quotes of their prompts.

        Raises:
            RewardError: A prompt has no text in quotes.
        """
        for text in prompt:
            quoted_text(text)  # a prompt that cannot be scored is told before any image is read
        with ThreadPoolExecutor(max_workers=self.options.workers) as pool:
            read = list(pool.map(self._read, image))
        scores = [ocr_score(text, pieces) for text, pieces in zip(prompt, read, strict=True)]
        return RewardModelOutput(scores, {"recognised": [joined_text(pieces) for pieces in read]})

    def __getstate__(self) -> dict[str, Any]:
        """Leave the recognisers out, which no process can send to another."""
        return {key: value for key, value in vars(self).items() if key != "_idle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._load()

    def _load(self) -> None:
        options: OCROptions = self.options
        self._idle: SimpleQueue[Any] = SimpleQueue()  # recognisers that nobody is using
        for _ in range(options.workers):
            self._idle.put(_recogniser(options.detection_side))

    def _read(self, image: Image.Image) -> list[Piece]:
        pixels = _pixels(image, upscale=self.options.upscale)
        recogniser = self._idle.get()
        try:
            result = recogniser(pixels, use_det=True)
        finally:
            self._idle.put(recogniser)
        # Without text the recogniser answers None for both.
        return [Piece(text, float(score)) for text, score in zip(result.txts or (), result.scores or (), strict=True)]


def _recogniser(side: int) -> Any:
    """Load one single-threaded RapidOCR, all of it: it would load its second model only when it first finds text."""
    # find_spec, as an ImportError of the import itself would also be that of a dependency
    missing = [name for name in OCRReward.packages if find_spec(name) is None]
    if missing:
        raise RewardError(f"the OCR reward needs {missing[0]}, which is not installed: pip install 'tiltflow[ocr]'")
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    paths = [models / DETECTION_MODEL, models / RECOGNITION_MODEL]
    for path in paths:
        if not path.is_file():
            raise RewardError(
                f"the OCR reward reads with {path.name}, which is not at {path}; it comes in the wheel of RapidOCR "
                "3.10: pip install --force-reinstall 'rapidocr==3.10.*'"
            )
    recogniser = rapidocr.RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,  # as in the reference: no text is upside down
            "Det.model_path": str(paths[0]),
            "Rec.model_path": str(paths[1]),
            "Det.limit_type": "max",
            "Det.limit_side_len": side,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    blank = np.full((64, 64, 3), 255, dtype=np.uint8)
    recogniser(blank, use_det=False)
    recogniser(blank, use_det=True)
    return recogniser


def _pixels(image: Image.Image, *, upscale: int) -> NDArray[np.uint8]:
    """Return an image as RapidOCR takes arrays, uint8 `[H, W, 3]` in the order BGR."""
    image = to_rgb(image)
    if upscale > 1:
        image = image.resize((image.width * upscale, image.height * upscale), Image.Resampling.NEAREST)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _bare(text: str) -> str:
    return text.replace(" ", "").lower()
