"""GenEval's colour check: which of ten colours has an object that a detector outlined?

The object is cut out on grey, CLIP embeds the cut, and the colour whose texts lie nearest wins:

    class vector of colour c = unit(mean over templates of unit(text features))
    logits = 100 * unit(image features) . class vectors

Source: djghosh13/geneval `evaluation/evaluate_images.py`; LAION's clip_benchmark `zeroshot_classification.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.clip_backbone import ClipBackbone
from tiltflow.scorers.clip_loading import load_clip_folder
from tiltflow.scorers.preprocess import normalise

COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES: Final = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
COLOR_MODEL: Final = WeightsFolder("openai/clip-vit-large-patch14")
BACKGROUND: Final = (153, 153, 153)  # #999, around the object
LOGIT_SCALE: Final = 100.0
CROPS_PER_PASS: Final = 64

Tokenize = Callable[[Sequence[str]], Tensor]  # N texts -> token ids [N, L]


class ColorClassifier(nn.Module):
    """Names the colour of cut-out objects; frozen and in eval mode."""

    def __init__(self, model: CLIPModel, tokenize: Tokenize):
        """Classify with a CLIP model.

        Args:
            model: GenEval's is OpenAI's ViT-L/14, whose activation is the quick GELU.
            tokenize: Turns texts into token ids.
        """
        super().__init__()
        self.model = model
        self.eval().requires_grad_(False)
        self._tokenize = tokenize
        self._vectors: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Side of the square that the network reads."""
        vision: Any = self.model.config.vision_config
        return vision.image_size

    def crop(self, image: NDArray[np.uint8], box: Sequence[float], mask: NDArray[np.bool_] | None = None) -> Tensor:
        """Return the network's input for one object; see `color_crop`."""
        return color_crop(image, box, mask, size=self.size)

    def colors(self, crops: Sequence[Tensor], labels: Sequence[str]) -> list[str]:
        """Return the colour of each crop.

        Args:
            crops: N inputs from `crop`.
            labels: What each object is, in words: it is part of the texts.

        Raises:
            RewardError: The network's answer is not finite, of which the greatest would be some colour.
        """
        logits = self.logits(crops, labels)
        if not logits.isfinite().all():
            raise RewardError(
                "the CLIP that names colours answered NaN or infinite values; compute in float32, or look for damaged "
                "weights"
            )
        return [COLORS[index] for index in logits.argmax(1).tolist()]

    @torch.inference_mode()
    def logits(self, crops: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
        """Return the logits of the ten colours, float32 `[N, 10]`; see `colors`."""
        rows = [torch.zeros(0, len(COLORS))]
        for start in range(0, len(crops), CROPS_PER_PASS):
            pixels = torch.stack(list(crops[start : start + CROPS_PER_PASS]))
            vectors = torch.stack([self.class_vectors(label) for label in labels[start : start + CROPS_PER_PASS]])
            features = self._image_features(pixels)
            rows.append(LOGIT_SCALE * torch.einsum("nd,ndc->nc", features, vectors.to(features.device)).cpu())
        return torch.cat(rows)

    @torch.inference_mode()
    def class_vectors(self, label: str) -> Tensor:
        """Return the unit vectors of the ten colours of an object, float32 `[D, 10]`; computed once per label."""
        if label not in self._vectors:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            features = self._text_features(self._tokenize(texts)).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._vectors[label] = _unit(features.mean(1)).T
        return self._vectors[label]

    def _image_features(self, pixels: Tensor) -> Tensor:
        weight = self.model.visual_projection.weight
        output: Any = self.model.vision_model(pixel_values=pixels.to(weight.device, weight.dtype))
        return _unit(self.model.visual_projection(output.pooler_output))

    def _text_features(self, tokens: Tensor) -> Tensor:
        # without a mask: the text tower is causal, so what follows the end token does not reach its features
        output: Any = self.model.text_model(input_ids=tokens.to(self.model.text_projection.weight.device))
        return _unit(self.model.text_projection(output.pooler_output))


def color_crop(
    image: NDArray[np.uint8], box: Sequence[float], mask: NDArray[np.bool_] | None = None, *, size: int = 224
) -> Tensor:
    """Cut an object out on grey and bring it into CLIP's form.

    Args:
        image: RGB, uint8 `[H, W, 3]`.
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; rounded half to even; beyond the image lies black.
        mask: Which pixels are the object, `[H, W]`; None leaves the surroundings as they are.
        size: Side of the square that the network reads.

    Returns:
        float32 `[3, size, size]`. The resize rounds to 8 bits, as the classifier's own pipeline does.

    Raises:
        RewardError: The box is empty.
    """
    left, top, right, bottom = (round(float(edge)) for edge in box)
    if right <= left or bottom <= top:
        raise RewardError(f"box={list(map(float, box))!r} is empty; give x1 < x2 and y1 < y2")
    if mask is not None:
        image = np.where(mask[..., None], image, np.array(BACKGROUND, dtype=np.uint8))
    cut = Image.fromarray(image).crop((left, top, right, bottom))
    short = min(cut.size)
    width, height = (int(size * side / short) for side in cut.size)
    cut = cut.resize((width, height), Image.Resampling.BICUBIC)
    x, y = round((width - size) / 2), round((height - size) / 2)
    pixels = np.array(cut.crop((x, y, x + size, y + size)))
    return normalise(torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255)[0]


@dataclass(frozen=True)
class ClipTokens:
    """A CLIP's tokenizer as a function of texts."""

    backbone: ClipBackbone  # whole: rewards that are built later share it while something holds it

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids `[N, L]`, padded to the network's length."""
        config: Any = self.backbone.model.config.text_config
        length: int = config.max_position_embeddings
        made: Any = self.backbone.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return made["input_ids"]


def load_color_classifier(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ColorClassifier:
    """Return a classifier over a CLIP model in transformers' format, with the activation that its config names.

    The network is shared with the rewards that read the same folder on the same device in the same dtype.

    Raises:
        RewardError: The folder holds no complete CLIP model or no tokenizer.
    """
    backbone = load_clip_folder(folder, device=device, dtype=dtype)
    return ColorClassifier(backbone.model, ClipTokens(backbone))


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1)
