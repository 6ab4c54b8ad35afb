"""CLIPScore, PickScore and HPSv2: how well an image fits its prompt, by the cosine of their CLIP embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, final

import torch
from torch import Tensor

from tiltflow.errors import RewardError
from tiltflow.scorers.base import Images, Scorer
from tiltflow.scorers.clip_backbone import ClipBackbone, Preprocess
from tiltflow.scorers.clip_loading import load_clip_checkpoint, load_clip_folder
from tiltflow.scorers.open_clip import HiddenAct

ClipKind = Literal["clip", "pickscore", "hpsv2"]
ClipScale = Literal["cosine", "logits"]

# What each score was published as: PickScore as a logit, the other two as a cosine.
DEFAULT_SCALE: Final[dict[ClipKind, ClipScale]] = {"clip": "cosine", "pickscore": "logits", "hpsv2": "cosine"}


@final
class ClipScorer(Scorer):
    """Scores an image i against its prompt t by their unit embeddings.

        cosine = <t, i>        logits = exp(logit_scale) <t, i>

    CLIPScore is the cosine of OpenAI's ViT-L/14 (arXiv 2104.08718 without its factor 2.5 and its clamp at 0), PickScore
    the logit of a fine-tuned ViT-H/14 (arXiv 2305.01569, eq. 1), HPSv2 the cosine of another one (arXiv 2306.09341).
    The first two crop the image's centre, HPSv2 pads it to a square.
    """

    differentiable = True

    def __init__(
        self, backbone: ClipBackbone, *, kind: ClipKind, scale: ClipScale | None = None, antialias: bool = True
    ):
        """Score with a network that other scorers may share.

        Args:
            backbone: The network; it is frozen.
            kind: Which preprocessing and which default scale.
            scale: Cosines or logits; None as the score was published.
            antialias: False resizes as installations of HPSv2 from 2023 did; the other kinds do not have it.

        Raises:
            RewardError: `antialias=False` for another kind than "hpsv2".
        """
        super().__init__()
        self.backbone = backbone
        self.kind: ClipKind = kind
        self.scale: ClipScale = scale or DEFAULT_SCALE[kind]
        self.preprocess = Preprocess("pad" if kind == "hpsv2" else "crop", antialias)
        self.freeze()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        kind: ClipKind,
        scale: ClipScale | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        share: bool = True,
    ) -> "ClipScorer":
        """Load from a folder in transformers' format, such as PickScore_v1 or clip-vit-large-patch14.

        `share=False` makes a network of its own, to be trained; see `load_clip_folder` for the rest and the errors.
        """
        backbone = load_clip_folder(Path(folder), device=device, dtype=dtype, share=share)
        return cls(backbone, kind=kind, scale=scale)

    @classmethod
    def from_open_clip(
        cls,
        path: str | Path,
        *,
        kind: ClipKind,
        hidden_act: HiddenAct,
        scale: ClipScale | None = None,
        antialias: bool = True,
        tokenizer: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        share: bool = True,
    ) -> "ClipScorer":
        """Load from a file in open_clip's layout, such as HPS_v2.1_compressed.pt.

        See `load_clip_checkpoint` for the arguments and the errors.
        """
        backbone = load_clip_checkpoint(
            Path(path), hidden_act=hidden_act, tokenizer=tokenizer, device=device, dtype=dtype, share=share
        )
        return cls(backbone, kind=kind, scale=scale, antialias=antialias)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return the scores of B image-prompt pairs, float32 `[B]`.

        Raises:
            RewardError: There are not as many prompts as images.
        """
        if len(images) != len(prompts):
            raise RewardError(f"{len(images)} images with {len(prompts)} prompts: give every image its own prompt")
        text = self.backbone.text_features(prompts)
        image = self.backbone.image_features(images, self.preprocess)
        cosine = (text * image).sum(dim=-1)
        return self.backbone.logit_scale * cosine if self.scale == "logits" else cosine
