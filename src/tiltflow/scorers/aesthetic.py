"""LAION's aesthetic predictor: a linear head that reads how much people like an image off its CLIP embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn

from tiltflow.errors import RewardError
from tiltflow.scorers.base import Images, Scorer
from tiltflow.scorers.checkpoints import load_strictly, read_weights
from tiltflow.scorers.clip_backbone import ClipBackbone, Preprocess
from tiltflow.scorers.clip_loading import load_clip_folder

CLIP_WIDTH: Final = 768  # of a ViT-L/14 embedding


@final
class AestheticHead(nn.Module):
    """Five linear layers, D-1024-128-64-16-1, with dropout and nothing else between them.

    The names of its weights are those of the published file, `layers.{0,2,4,6,7}`. In eval mode it is one affine map,
    computed in its published factors.

    Source: christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(self, width: int = CLIP_WIDTH):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, source: str = "the checkpoint") -> "AestheticHead":
        """Build the head, in float32 on the CPU and in eval mode, from its published weights.

        Raises:
            RewardError: A weight is missing, unexpected or of another shape.
        """
        first = state.get("layers.0.weight")
        head = cls(first.shape[1] if first is not None and first.ndim == 2 else CLIP_WIDTH)
        load_strictly(head, state, source=source)
        return head.eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the ratings, about 1 to 10, of unit embeddings: `[B, D]` to `[B]`."""
        return self.layers(embeddings).squeeze(-1)


@final
class AestheticScorer(Scorer):
    """Rates images from about 1 to 10, whatever the prompt, by the unit embedding of a ViT-L/14 and a linear head.

    The head stays in float32 in every dtype of the network: its ratings differ in the second decimal.
    """

    differentiable = True

    def __init__(self, backbone: ClipBackbone, head: AestheticHead):
        """Score with a network that other scorers may share.

        Raises:
            RewardError: The head was made for embeddings of another width.
        """
        super().__init__()
        if backbone.width != head.width:
            raise RewardError(
                f"the aesthetic head reads embeddings of width {head.width}, the CLIP network makes {backbone.width}; "
                "use the network that the head was fitted to (openai/clip-vit-large-patch14)"
            )
        self.backbone = backbone
        self.head = head.to(backbone.device, torch.float32)
        self.preprocess = Preprocess()
        self.freeze()

    @classmethod
    def from_files(
        cls,
        folder: str | Path,
        head: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        share: bool = True,
    ) -> "AestheticScorer":
        """Load the CLIP network from a folder in transformers' format and the head from its file.

        See `load_clip_folder` for the arguments.

        Raises:
            RewardError: Something cannot be read, or does not fit.
        """
        weights = AestheticHead.from_state(read_weights(Path(head)), source=str(head))
        return cls(load_clip_folder(Path(folder), device=device, dtype=dtype, share=share), weights)

    def score(self, images: Images, prompts: Sequence[str] = ()) -> Tensor:
        """Return the ratings of B images, float32 `[B]`; prompts are ignored."""
        return self.head(self.backbone.image_features(images, self.preprocess))
