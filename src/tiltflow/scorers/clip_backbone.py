"""A CLIP network whose image and text features several rewards share."""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from tiltflow.errors import RewardError
from tiltflow.scorers.base import Images
from tiltflow.scorers.memory import ImageMemory, TextMemory
from tiltflow.scorers.preprocess import clip_preprocess, hps_preprocess

REMEMBERED_PROMPTS: Final = 4096  # 16 MB of ViT-H features
LEGACY_EOS: Final = 2  # configs with this end-of-text id mean: pool at the largest id


@dataclass(frozen=True)
class Preprocess:
    """How images become the network's input; equal ones share features."""

    layout: Literal["crop", "pad"] = "crop"  # CLIP's centre crop, or HPSv2's zero padding
    antialias: bool = True  # False only for "pad": HPSv2 as installed in 2023

    def __post_init__(self) -> None:
        if self.layout == "crop" and not self.antialias:
            raise RewardError("antialias=False: only HPSv2's preprocessing has this variant; leave it True")

    def __call__(self, images: Images, size: int) -> Tensor:
        """Return the network's input, `[B, 3, size, size]`, from images in [0, 1]."""
        if self.layout == "crop":
            return clip_preprocess(images, size=size)
        return hps_preprocess(images, size=size, antialias=self.antialias)


@final
class ClipBackbone(nn.Module):
    """A CLIPModel with its tokenizer, giving unit vectors.

    Features of an image are remembered while its tensor lives and is not written to, those of a prompt while it is
    among the last used ones, so that several rewards over one backbone encode each of them once. Nothing is remembered
    where a gradient is wanted, in training mode, or under autocast; a change of the weights forgets everything.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, *, remembered_prompts: int = REMEMBERED_PROMPTS):
        """Freeze the network.

        Args:
            model: The network.
            tokenizer: CLIP's; pads and truncates to the network's context length.
            remembered_prompts: How many prompts' features are kept.

        Raises:
            RewardError: The tokenizer is not that of the network.
        """
        super().__init__()
        _check_tokenizer(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.eval().requires_grad_(False)
        self._images = ImageMemory()
        self._texts = TextMemory(remembered_prompts)
        self._weights: object = None  # the state of the weights that the memories belong to
        # Held while the network runs: of two rewards in two threads, the second finds what the first has encoded.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which cannot be copied, and what belongs to the weights' place in memory."""
        return {**self.__dict__, "_lock": None, "_weights": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.visual_projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes; the logit scale is in float32 all the same."""
        return self.model.visual_projection.weight.dtype

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower reads, pixels."""
        config: Any = self.model.config.vision_config
        return config.image_size

    @property
    def width(self) -> int:
        """Length D of a feature."""
        return self.model.visual_projection.weight.shape[0]

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by to make logits, a scalar: about 100."""
        return self.model.logit_scale.float().exp()

    def image_features(self, images: Images, preprocess: Preprocess) -> Tensor:
        """Return the images' embeddings, L2-normalised, float32 `[B, D]`.

        Args:
            images: B images in [0, 1].
            preprocess: How they become the network's input.

        Raises:
            RewardError: The images are integers.
        """
        if not len(images):
            return torch.zeros(0, self.width, device=self.device)
        if not images[0].is_floating_point():
            raise RewardError(
                f"the images are {images[0].dtype}; pass floats in [0, 1] (levels of a byte, divided by 255)"
            )
        wanted = torch.is_grad_enabled() and _any_requires_grad(images)
        weights = None if wanted else self._remembering()
        if weights is None:
            return self._encode_images(images, preprocess)
        rows = list(images.unbind()) if isinstance(images, Tensor) else list(images)
        with self._lock, torch.no_grad():
            self._forget_other_weights(weights)
            found = [self._images.get(row, preprocess) for row in rows]
            missing = [index for index, feature in enumerate(found) if feature is None]
            if missing:
                # A batch of which nothing is known goes as it is: stacking its rows again costs as much as resizing.
                new = images if len(missing) == len(rows) else [rows[index] for index in missing]
                fresh = self._encode_images(new, preprocess)
                for index, feature in zip(missing, fresh, strict=True):
                    self._images.put(rows[index], preprocess, feature)
                    found[index] = feature
        return torch.stack([feature for feature in found if feature is not None])

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' embeddings, L2-normalised, float32 `[B, D]`; what is too long is cut off."""
        if not len(prompts):
            return torch.zeros(0, self.width, device=self.device)
        weights = self._remembering()
        if weights is None:
            return self._encode_prompts(prompts)
        with self._lock, torch.no_grad():
            self._forget_other_weights(weights)
            found = {prompt: self._texts.get(prompt) for prompt in prompts}
            missing = [prompt for prompt, feature in found.items() if feature is None]
            if missing:
                for prompt, feature in zip(missing, self._encode_prompts(missing), strict=True):
                    self._texts.put(prompt, feature.clone())  # a row would keep its whole batch
                    found[prompt] = feature
        features = [found[prompt] for prompt in prompts]
        return torch.stack([feature for feature in features if feature is not None])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed pixels `[B, 3, S, S]`: L2-normalised, float32 `[B, D]`; nothing is remembered.

        A network in float64 gives float64.
        """
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return _unit(self.model.visual_projection(pooled))

    def encode_tokens(self, input_ids: Tensor) -> Tensor:
        """Encode token ids `[B, L]`: L2-normalised, float32 `[B, D]`; nothing is remembered.

        There is no attention mask: text attends backwards only, so what pads it after its end changes nothing.
        """
        pooled = self.model.text_model(input_ids=input_ids.to(self.device)).pooler_output
        return _unit(self.model.text_projection(pooled))

    def checkpoint_activations(self) -> None:
        """From now on compute activations again in the backward pass of training instead of keeping them."""
        with warnings.catch_warnings():
            # Later releases of transformers 5 have another name for it, which the earlier ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forget(self) -> None:
        """Forget all features."""
        with self._lock:
            self._images.clear()
            self._texts.clear()

    def _encode_images(self, images: Images, preprocess: Preprocess) -> Tensor:
        if not isinstance(images, Tensor) and len({image.shape for image in images}) == 1:
            images = torch.stack(list(images))  # one copy to the device instead of B
        if isinstance(images, Tensor):
            return self.encode_pixels(preprocess(images.to(self.device, torch.float32), self.image_size))
        moved = [image.to(self.device, torch.float32) for image in images]
        return self.encode_pixels(preprocess(moved, self.image_size))

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        length = self.model.text_model.embeddings.position_embedding.weight.shape[0]
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.encode_tokens(tokens["input_ids"])

    def _remembering(self) -> object:
        """Return the state of the weights, or None where features must be computed anew."""
        if self.training or torch.is_autocast_enabled(self.device.type):
            return None
        weights = _weights(self)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return None
        if any(weight.is_inference() for weight in weights):  # such tensors do not count their changes
            return None
        return hash(tuple([(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]))

    def _forget_other_weights(self, weights: object) -> None:
        if weights != self._weights:
            self.forget()
            self._weights = weights


class BackboneKey(NamedTuple):
    """What makes two backbones the same one."""

    source: str  # the weights' file or folder and how they are read
    device: torch.device
    dtype: torch.dtype


_shared: weakref.WeakValueDictionary[BackboneKey, ClipBackbone] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_backbone(key: BackboneKey, build: Callable[[], ClipBackbone]) -> ClipBackbone:
    """Return the process's backbone for a key, building it if there is none; it lives as long as somebody uses it.

    One that was since moved, cast or made trainable is no longer what the key says and is left to its user.
    """
    with _shared_lock:
        found = _shared.get(key)
        if found is not None and _still(found, key):
            return found
        built = build()
        _shared[key] = built
        return built


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device with its index, so that "cuda" and "cuda:0" are one key."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def _still(backbone: ClipBackbone, key: BackboneKey) -> bool:
    trainable = backbone.training or any(weight.requires_grad for weight in backbone.parameters())
    return backbone.device == key.device and backbone.dtype == key.dtype and not trainable


def _weights(module: nn.Module) -> list[Tensor]:
    """Return all parameters, as `parameters()` does in four times the time, building names; this runs every batch."""
    found: list[Tensor] = [weight for weight in module._parameters.values() if weight is not None]
    for child in module._modules.values():
        if child is not None:
            found += _weights(child)
    return found


def _any_requires_grad(images: Images) -> bool:
    return images.requires_grad if isinstance(images, Tensor) else any(image.requires_grad for image in images)


def _check_tokenizer(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    config: Any = model.config.text_config
    if len(tokenizer) > config.vocab_size:
        raise RewardError(
            f"the tokenizer has {len(tokenizer)} tokens, the network {config.vocab_size}; use the network's tokenizer"
        )
    expected = len(tokenizer) - 1 if config.eos_token_id == LEGACY_EOS else config.eos_token_id
    if tokenizer.eos_token_id != expected:
        raise RewardError(
            f"the tokenizer ends texts with token {tokenizer.eos_token_id}, the network pools at token {expected}; use "
            "the network's tokenizer"
        )
