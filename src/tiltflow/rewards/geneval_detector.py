"""GenEval's own detector: Mask2Former finds and outlines the objects, CLIP names their colours."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from tiltflow.errors import RewardError
from tiltflow.rewards.geneval import MAX_OBJECTS, THRESHOLD, Detection
from tiltflow.rewards.geneval_reward import ColoringDetector, KnownClasses
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.geneval_color import COLOR_MODEL, load_color_classifier
from tiltflow.scorers.mask2former import Channels, Instances, Resize, find_mask2former, load_mask2former

# COCO's classes in the detector's order and GenEval's words (`object_names.txt`).
CLASSES: Final = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
    bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
    snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
    fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
    potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,
    toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n    ", "").split(
        ","
    )
)


class Mask2FormerDetector(ColoringDetector, KnownClasses):
    """Detects COCO's 80 classes with the network, sizes and thresholds of GenEval's evaluation.

    Objects whose score is not above the threshold are left out, as are those of a class after its 16 best.
    """

    classes = CLASSES

    def __init__(
        self,
        *,
        weights: str | None = None,
        color_model: str = COLOR_MODEL.repo,
        resize: Resize = "800px",
        channels: Channels = "rgb",
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """Load both models.

        Args:
            weights: mmdet file, or folder or hub name in transformers' format; None: see `load_mask2former`.
            color_model: Folder or hub name of a CLIP model in transformers' format; GenEval's is OpenAI's ViT-L/14.
            resize: `800px` as GenEval, or `native`.
            channels: `rgb` as GenEval's own evaluation, `bgr` as the reward servers of published training runs.
            batch_size: Images per forward pass.
            device: Where both compute.
            dtype: In what both compute.

        Raises:
            RewardError: Weights are missing, unreadable, or not of a detector with 80 classes.
        """
        # both are looked for before either is read, which takes a while
        find_mask2former(weights)
        clip = WeightsFolder(color_model).require()
        self._network = load_mask2former(weights, resize=resize, channels=channels, device=device, dtype=dtype)
        if self._network.num_classes != len(CLASSES):
            raise RewardError(
                f"weights={weights!r} tell {self._network.num_classes} classes apart; GenEval needs a network trained "
                f"on COCO's {len(CLASSES)} object classes (instance segmentation)"
            )
        self._classifier = load_color_classifier(clip, device=device, dtype=dtype)
        self._batch_size = batch_size

    def __call__(
        self, images: Sequence[NDArray[np.uint8]], *, colored: Sequence[Collection[str]] | None = None
    ) -> list[list[Detection]]:
        """Return the objects of each RGB image; see `ColoringDetector`."""
        wanted = [CLASSES] * len(images) if colored is None else colored
        tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]
        found = self._network.detect(tensors, min_score=THRESHOLD, batch_size=self._batch_size)
        parts = [_kept(instances) for instances in found]
        crops, labels, places = [], [], []
        for row, (image, kept, classes) in enumerate(zip(images, parts, wanted, strict=True)):
            for place, (index, detection) in enumerate(kept):
                if detection.label in classes:
                    box = (detection.x1, detection.y1, detection.x2, detection.y2)
                    crops.append(self._classifier.crop(image, box, found[row].masks[index].numpy()))
                    labels.append(detection.label)
                    places.append((row, place))
        names = dict(zip(places, self._classifier.colors(crops, labels), strict=True))
        return [
            [_with_color(detection, names.get((row, place))) for place, (_, detection) in enumerate(kept)]
            for row, kept in enumerate(parts)
        ]


def _kept(instances: Instances) -> list[tuple[int, Detection]]:
    """Return the detections of one image with their rows, at most 16 of a class, best first."""
    seen: Counter[str] = Counter()
    kept: list[tuple[int, Detection]] = []
    rows = zip(instances.labels.tolist(), instances.boxes.tolist(), instances.scores.tolist(), strict=True)
    for index, (label, (x1, y1, x2, y2), score) in enumerate(rows):
        name = CLASSES[label]
        seen[name] += 1
        if seen[name] <= MAX_OBJECTS:
            kept.append((index, Detection(name, x1, y1, x2, y2, score)))
    return kept


def _with_color(detection: Detection, color: str | None) -> Detection:
    return detection if color is None else replace(detection, color=color)
