"""ImageReward: how well an image fits its prompt and people's taste, by a cross-attending BLIP."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from tiltflow.errors import RewardError
from tiltflow.scorers.base import Images, Scorer
from tiltflow.scorers.checkpoints import FirstOf, WeightsFile, load_strictly, read_weights
from tiltflow.scorers.image_reward_weights import (
    ImageRewardSizes,
    convert_image_reward,
    image_reward_sizes,
    without_prefix,
)
from tiltflow.scorers.preprocess import clip_preprocess

WEIGHTS: Final = WeightsFile("ImageReward.pt", page="huggingface.co/THUDM/ImageReward", repo="THUDM/ImageReward")
VISION_HEADS: Final = 16  # of the published network
TEXT_HEADS: Final = 12
MAX_TOKENS: Final = 35  # [CLS] and [SEP] included; what is longer is cut
SCORE_MEAN: Final = 0.16717362830052426  # over the reference's training images
SCORE_STD: Final = 1.0333394966054072

_BERT_PAGE = "huggingface.co/google-bert/bert-base-uncased"
# The vocabulary goes by two repository names, of which the short one is older; either file of it is enough.
VOCABULARIES: Final = tuple(
    WeightsFile(f"bert-base-uncased/{file}", page=_BERT_PAGE, repo=repo, file=file)
    for file in ("vocab.txt", "tokenizer.json")
    for repo in ("google-bert/bert-base-uncased", "bert-base-uncased")
)
EXTRA_TOKENS: Final = ("[DEC]", "[ENC]")  # BLIP's additions to BERT's vocabulary


class ImageRewardScorer(Scorer):
    """Scores how well an image fits its prompt: standardised, so that most images score between -2 and 2.

    The prompt's tokens attend to each other and, in every layer, to all image tokens; the last state h of [CLS] is read
    by a stack of linear layers: score = (head(h) - mean) / std. Each image is scored with its own prompt only: the cost
    is that of B pairs.

    Source: Xu et al. 2023 (arXiv:2304.05977), section 3, in the released THUDM/ImageReward network.
    """

    differentiable = True

    def __init__(self, sizes: ImageRewardSizes, tokenizer: BertTokenizer):
        """Build the network with random weights.

        Args:
            sizes: Of the network.
            tokenizer: BERT's with BLIP's additional tokens.

        Raises:
            RewardError: The tokenizer has another number of tokens than the network.
        """
        super().__init__()
        if len(tokenizer) != sizes.vocabulary:
            raise RewardError(
                f"the tokenizer of ImageReward has {len(tokenizer)} tokens where its network has {sizes.vocabulary}; "
                f"use the vocabulary of bert-base-uncased with {', '.join(EXTRA_TOKENS)} added"
            )
        self.image_size = sizes.image_size
        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(_vision_config(sizes))
        self.text = BlipTextModel(_text_config(sizes), add_pooling_layer=False)
        self.head = _head(sizes.head)
        self.freeze()

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        tokenizer: BertTokenizer,
        *,
        vision_heads: int = VISION_HEADS,
        text_heads: int = TEXT_HEADS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ImageRewardScorer":
        """Load the published file, or one of its layout.

        Args:
            path: `ImageReward.pt`, or safetensors with the same names.
            tokenizer: As `image_reward_tokenizer` makes it.
            vision_heads: Attention heads of the vision transformer; the weights do not tell.
            text_heads: Attention heads of the text encoder.
            device: Where to compute.
            dtype: In which to compute.

        Raises:
            RewardError: The file cannot be read, or a weight is missing, unexpected or misshapen.
        """
        state = without_prefix(read_weights(path))
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        scorer = cls(image_reward_sizes(shapes, vision_heads=vision_heads, text_heads=text_heads), tokenizer)
        load_strictly(scorer, convert_image_reward(state), source=str(path))
        return scorer.to(device=device, dtype=dtype)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return the scores, float32 `[B]`, differentiable to the pixels.

        Args:
            images: B images in [0, 1]: `[B, 3, H, W]`, or B tensors `[3, H, W]` of any sizes.
            prompts: B prompts, one per image.

        Raises:
            RewardError: There are more or fewer prompts than images.
        """
        if len(images) != len(prompts):
            raise RewardError(f"ImageReward got {len(images)} images and {len(prompts)} prompts; give one per image")
        if not len(images):
            return torch.zeros(0, device=self.device)
        if isinstance(images, Tensor):  # as one batch: taking it apart and stacking it again costs half a resize
            moved: Images = images.to(self.device, torch.float32)
        else:
            moved = [image.to(self.device, torch.float32) for image in images]
        pixels = clip_preprocess(moved, size=self.image_size)
        tokens, mask = self.tokenize(prompts)
        return self(pixels, tokens, mask)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Score preprocessed images with their tokenised prompts.

        Args:
            pixels: `[B, 3, S, S]`, normalised.
            tokens: `[B, L]` int64.
            mask: `[B, L]` int64, 1 for tokens and 0 for padding.

        Returns:
            Scores, float32 `[B]`.
        """
        state = self.read(tokens, mask, self.look(pixels))
        return (self.head(state).squeeze(1).float() - SCORE_MEAN) / SCORE_STD

    def look(self, pixels: Tensor) -> Tensor:
        """Return the image tokens `[B, 1 + patches, W]` of preprocessed images, class token first."""
        return self.vision(pixel_values=pixels.to(self.dtype)).last_hidden_state

    def read(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Return the state of [CLS], `[B, D]`, after reading prompts `[B, L]` that attend to their image's tokens.

        The reference adds -10000 to the attention scores of padding; the most negative number, as here, gives the same
        attention in floating point: zero.
        """
        output = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image)
        return output.last_hidden_state[:, 0]

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask, int64 `[B, 35]`; cut or padded to one length, so that rows are independent."""
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)


def image_reward_tokenizer() -> BertTokenizer:
    """Return BERT's tokenizer with BLIP's additional tokens.

    It is looked for in the models folder, under `bert-base-uncased`, then in the hub's cache.

    Raises:
        RewardError: It is nowhere.
    """
    tokenizer = BertTokenizer.from_pretrained(FirstOf(VOCABULARIES).require().parent, local_files_only=True)
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    return tokenizer


def _vision_config(sizes: ImageRewardSizes) -> BlipVisionConfig:
    return BlipVisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_size=sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_inner,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # of the original; transformers' default differs
    )


def _text_config(sizes: ImageRewardSizes) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.positions,
        hidden_size=sizes.text_width,
        encoder_hidden_size=sizes.vision_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        intermediate_size=sizes.text_inner,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        bos_token_id=None,  # nothing is generated
        eos_token_id=None,
        is_decoder=True,  # only so that cross-attention is there; the prompt is read in both directions
    )


def _head(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers without activations between them; the dropouts work in training only."""
    first, second, third, *rest = (nn.Linear(size_in, size_out) for size_in, size_out in pairwise(widths))
    return nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), *rest)
