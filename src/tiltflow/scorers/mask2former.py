"""Mask2Former with a Swin backbone: finds and outlines objects, as GenEval's detector does, without mmdet.

The network is transformers'; what is around it follows mmdet's test pipeline, which GenEval's published numbers come
from: keep-ratio resize to at most 1333x800, normalisation, padding to a multiple of 32, then the 100 best pairs of a
query and a class, each with its mask at image size.

Source: Cheng et al. 2022 (Mask2Former); open-mmlab/mmdetection `mask2former_head.py` and `maskformer_fusion_head.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import FirstOf, WeightsFile, WeightsFolder, load_strictly
from tiltflow.scorers.mask2former_keys import convert_mmdet, mmdet_config, read_mmdet

Resize = Literal["800px", "native"]
Channels = Literal["rgb", "bgr"]

PIXEL_MEAN: Final = (123.675, 116.28, 103.53)  # of RGB on 0..255
PIXEL_STD: Final = (58.395, 57.12, 57.375)
LONG_SIDE, SHORT_SIDE = 1333, 800  # pixels after resizing, at most
STRIDE: Final = 32  # the input's sides are multiples of it
MAX_INSTANCES: Final = 100  # per image
_FIXED_POINT: Final = 11  # bits of the resize's weights

_PAGE: Final = "download.openmmlab.com/mmdetection"
_VERSION_3: Final = "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco"
_VERSION_2: Final = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
# One training run in the names of mmdet 3 and of mmdet 2: GenEval's detector.
GENEVAL_WEIGHTS: Final = tuple(
    WeightsFile(f"{name}_20220504_001756-{digest}.pth", page=f"{page}/{name}/{name}_20220504_001756-{digest}.pth")
    for name, digest, page in (
        (_VERSION_3, "c9d0c4f2", f"{_PAGE}/v3.0/mask2former"),
        (_VERSION_2, "743b7d99", f"{_PAGE}/v2.0/mask2former"),
    )
)
_FILE_ENDINGS: Final = (".pth", ".pt", ".bin", ".safetensors")
_TRAINING_ONLY: Final = frozenset({"criterion.empty_weight"})  # in folders; class weights of the loss


@dataclass(frozen=True)
class Instances:
    """The K objects found in one image, best score first.

    Example: `Instances(tensor([41]), tensor([0.97]), tensor([[20., 210., 100., 290.]]), masks)`.
    """

    labels: Tensor  # [K] int64, number of the class
    scores: Tensor  # [K] float32 in [0, 1]: class probability times mean probability inside the mask
    boxes: Tensor  # [K, 4] float32: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; zeros if the mask is empty
    masks: Tensor  # [K, H, W] bool


class Mask2FormerNetwork(Mask2FormerPreTrainedModel):
    """transformers' Mask2Former with its class head, under the names of `Mask2FormerForUniversalSegmentation`.

    That class also makes its training loss, which needs scipy; nothing here trains.
    """

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        labels: Any = config.num_labels
        self.class_predictor = nn.Linear(config.hidden_dim, labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits `[B, Q, C + 1]`, background last, and mask logits `[B, Q, H / 4, W / 4]`."""
        output: Any = self.model(pixel_values)
        decoder: Any = self.model.transformer_module.decoder
        queries = decoder.layernorm(output.transformer_decoder_last_hidden_state)
        return self.class_predictor(queries), output.masks_queries_logits[-1]


class Mask2Former(nn.Module):
    """Detects objects in uint8 images; frozen and in eval mode."""

    def __init__(self, network: Mask2FormerNetwork, *, resize: Resize = "800px", channels: Channels = "rgb"):
        """Wrap a network.

        Args:
            network: The network with its weights.
            resize: `800px` as GenEval's own evaluation; `native` leaves the size: faster, not comparable.
            channels: `rgb` as trained; `bgr` exchanges red and blue, as the reward servers of published training runs
                did by passing RGB arrays where BGR ones were expected.

        Raises:
            RewardError: There is no such `resize` or `channels`.
        """
        super().__init__()
        for name, value, legal in (("resize", resize, get_args(Resize)), ("channels", channels, get_args(Channels))):
            if value not in legal:
                raise RewardError(f"{name}={value!r} must be one of {', '.join(legal)}")
        self.network = network
        self.resize: Resize = resize
        self.channels: Channels = channels
        self.eval().requires_grad_(False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the weights, not the network: transformers hooks functions into it that cannot be pickled."""
        return _remade, (self.network.config, self.network.state_dict(), self.resize, self.channels)

    @property
    def num_classes(self) -> int:
        """How many classes the network tells apart."""
        return self.network.class_predictor.out_features - 1  # the last is the background

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Tensor], *, min_score: float | None = None, batch_size: int = 8
    ) -> list[Instances]:
        """Return what each image shows.

        Args:
            images: RGB, uint8 `[3, H, W]`, of any sizes.
            min_score: Leave out instances whose score is not above this; None keeps all. A score is at most its class
                probability, so that masks of hopeless instances are never made.
            batch_size: Images per forward pass; images of different padded sizes never share one.

        Returns:
            Per image at most 100 instances, on the CPU.

        Raises:
            RewardError: The network's answer is not finite, which would pass for "nothing found".
        """
        rows_of: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            rows_of.setdefault(_padded(self._resized_shape(image)), []).append(row)
        found: dict[int, Instances] = {}
        for rows in rows_of.values():
            for chunk in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
                pixels = torch.stack([self.prepare(images[row]) for row in chunk])
                classes, masks = self.network(pixels)
                if not (classes.isfinite().all() and masks.isfinite().all()):
                    raise RewardError(
                        f"Mask2Former in {pixels.dtype} answered NaN or infinite values; compute in float32, or look "
                        "for damaged weights"
                    )
                for index, row in enumerate(chunk):
                    shape = self._resized_shape(images[row])
                    upsample = _Upsample(masks[index].float(), _padded(shape), shape, tuple(images[row].shape[-2:]))
                    found[row] = _instances(classes[index].float(), upsample, min_score=min_score)
        return [found[row] for row in range(len(images))]

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input for one RGB image, uint8 `[3, H, W]`: resized, normalised, padded with zeros.

        Padding follows mmdet 3; mmdet 2 pads before normalising. Square images become 800x800, which needs none.
        """
        weight = self.network.class_predictor.weight
        image = image.to(weight.device)
        if self.channels == "bgr":
            image = image.flip(0)
        height, width = self._resized_shape(image)
        levels = resize_levels(image, height, width).float()
        mean, std = (torch.tensor(value, device=weight.device).view(3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
        down, right = (full - side for full, side in zip(_padded((height, width)), (height, width), strict=True))
        return F.pad((levels - mean) / std, (0, right, 0, down)).to(weight.dtype)

    def _resized_shape(self, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        if self.resize == "native":
            return height, width
        scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
        return int(height * scale + 0.5), int(width * scale + 0.5)


def _remade(config: Mask2FormerConfig, state: Mapping[str, Tensor], resize: Resize, channels: Channels) -> Mask2Former:
    network = Mask2FormerNetwork(config)
    network.load_state_dict(state, assign=True)  # which also keeps the dtype
    return Mask2Former(network, resize=resize, channels=channels).to(network.class_predictor.weight.device)


def load_mask2former(
    weights: str | None = None,
    *,
    resize: Resize = "800px",
    channels: Channels = "rgb",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mask2Former:
    """Return a detector with published weights.

    Args:
        weights: An mmdet 2 or 3 `.pth` file, or a folder or hub name in transformers' format such as
            `facebook/mask2former-swin-small-coco-instance`. None takes GenEval's file from the models folder, in the
            names of mmdet 3 or of mmdet 2; a folder holds another training run and is never taken in its place.
        resize: See `Mask2Former`.
        channels: See `Mask2Former`.
        device: Where it computes.
        dtype: In what the network computes.

    Raises:
        RewardError: The weights are missing, unreadable, or do not fit.
    """
    path = find_mask2former(weights)
    network = _from_folder(path) if path.is_dir() else _from_mmdet(path)
    return Mask2Former(network, resize=resize, channels=channels).to(device=device, dtype=dtype)


def find_mask2former(weights: str | None = None) -> Path:
    """Return the file or folder that `load_mask2former` reads.

    Raises:
        RewardError: It is missing; says which file, where to get it and where to put it.
    """
    if weights is None:
        return FirstOf(GENEVAL_WEIGHTS).require()
    if Path(weights).is_file():
        return Path(weights)
    if weights.endswith(_FILE_ENDINGS):
        return WeightsFile(weights, page=GENEVAL_WEIGHTS[0].page).require()
    return WeightsFolder(weights).require()


def _from_mmdet(path: Path) -> Mask2FormerNetwork:
    state = read_mmdet(path)
    network = Mask2FormerNetwork(mmdet_config(state, source=str(path)))
    load_strictly(network, convert_mmdet(state), source=str(path))
    return network


def _from_folder(path: Path) -> Mask2FormerNetwork:
    """Read a folder in transformers' format as strictly as a file."""
    try:
        loaded: Any = Mask2FormerNetwork.from_pretrained(
            path,
            local_files_only=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that they are reported below, with the rest
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise RewardError(f"{path} cannot be loaded as Mask2Former: {error}") from error
    network, report = loaded
    problems = [f"missing {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(set(report["unexpected_keys"]) - _TRAINING_ONLY)]
    problems += [f"{name[0]} has another shape" for name in sorted(report["mismatched_keys"])]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RewardError(f"{path} does not fit Mask2Former: {'; '.join(problems[:3])}{more}")
    return network


def resize_levels(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 `[3, H, W]` bilinearly, half-pixel centres and no antialiasing, to uint8 `[3, height, width]`.

    The result equals OpenCV's `INTER_LINEAR`, on which mmdet rests, in every level: weights of 11 bits, first along
    rows, then along columns with the intermediate sums cut to 16 bits. Rounding a float resize instead changes one
    level in an eighth of the pixels.
    """
    if (height, width) == tuple(image.shape[-2:]):
        return image
    columns, weights = _taps(image.shape[2], width, clamp=True, device=image.device)
    across = image[:, :, columns[0]].int() * weights[0] + image[:, :, columns[1]].int() * weights[1]
    rows, weights = _taps(image.shape[1], height, clamp=False, device=image.device)
    upper, lower = ((across[:, rows[i]] >> 4) * weights[i][:, None] >> 16 for i in range(2))
    return ((upper + lower + 2) >> 2).to(torch.uint8)


def _taps(source: int, target: int, *, clamp: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the two source pixels of every target pixel, `[2, target]`, and their weights in 1/2048.

    Beyond the border both are the border's pixel; `clamp` gives the first all the weight there, which OpenCV does along
    rows only and which is visible in the rounding.
    """
    place = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).float()
    first = place.floor()
    share = place - first
    if clamp:
        share = share.masked_fill((first < 0) | (first >= source - 1), 0.0)
    pixels = torch.stack((first, first + 1)).long().clamp(0, source - 1)
    weights = (torch.stack((1 - share, share)) * 2**_FIXED_POINT).round().int()
    return pixels.to(device), weights.to(device)


@dataclass(frozen=True)
class _Upsample:
    """Mask logits of one image on the network's grid, and the way back to the image's pixels."""

    logits: Tensor  # [Q, h, w]
    padded: tuple[int, int]  # the network's input
    resized: tuple[int, int]  # the part of it that is the image
    original: tuple[int, ...]  # the image as it came

    def __call__(self, queries: Tensor) -> Tensor:
        """Return the mask logits of K queries at image size, `[K, H, W]`."""
        if len(queries) == 0:
            return self.logits.new_zeros(0, *self.original)
        masks = F.interpolate(self.logits[queries][None], size=self.padded, mode="bilinear", align_corners=False)
        masks = masks[..., : self.resized[0], : self.resized[1]]
        if self.original != self.resized:
            masks = F.interpolate(masks, size=self.original, mode="bilinear", align_corners=False)
        return masks[0]


def _instances(classes: Tensor, upsample: _Upsample, *, min_score: float | None) -> Instances:
    """Turn the class logits `[Q, C + 1]` and masks of one image into instances above a score."""
    floor = -1.0 if min_score is None else min_score
    chances = classes.softmax(-1)[:, :-1]  # [Q, C]
    best, flat = chances.flatten().topk(min(MAX_INSTANCES, chances.numel()))
    best, flat = best[best > floor], flat[best > floor]
    queries, place = (flat // chances.shape[1]).unique(return_inverse=True)  # a query may appear under several classes
    logits = upsample(queries)
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    scores = best * certainty[place]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > floor]
    labels, kept = (flat % chances.shape[1])[order], place[order]
    boxes = _boxes(masks)[kept]
    return Instances(labels.cpu(), scores[order].cpu(), boxes.cpu(), masks[kept].cpu())


def _boxes(masks: Tensor) -> Tensor:
    """Return x1, y1, x2, y2 around each mask `[K, H, W]`, x2 and y2 exclusive; zeros around nothing."""
    columns, rows = masks.any(1).int(), masks.any(2).int()  # [K, W], [K, H]
    first = [side.argmax(1) for side in (columns, rows)]
    last = [side.shape[1] - side.flip(1).argmax(1) for side in (columns, rows)]
    return torch.stack((*first, *last), dim=1).float() * masks.any(2).any(1)[:, None]


def _padded(shape: tuple[int, int]) -> tuple[int, int]:
    height, width = (-(-side // STRIDE) * STRIDE for side in shape)
    return height, width
