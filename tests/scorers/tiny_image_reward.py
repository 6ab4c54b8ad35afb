"""A small random ImageReward in the published layout, and a vocabulary of BERT's form: nothing is downloaded."""

from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 400  # rows of the token table; two of them are BLIP's
HEAD_WIDTHS = (96, 1024, 128, 64, 16, 1)


def write_vocabulary(folder: Path) -> Path:
    """Write a `vocab.txt` whose words are w0, w1, ... by their number, with BERT's special tokens at their places."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [special.get(index, f"w{index}") for index in range(VOCABULARY - 2)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_models(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write a models folder with both files under their published names."""
    write_vocabulary(folder / "bert-base-uncased")
    torch.save(state, folder / "ImageReward.pt")
    return folder


def random_state(*, layers: int = 2, image_size: int = 32) -> dict[str, Tensor]:
    """Return random weights under the published names: vision width 64, text width 96."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    for name, shape in _shapes(layers, image_size).items():
        spread = torch.Size(shape[1:]).numel() ** -0.5 if name.endswith("weight") and len(shape) > 1 else 0.3
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        state[name] = centre + spread * torch.randn(shape, generator=generator)
    return state


def _shapes(layers: int, image_size: int) -> dict[str, tuple[int, ...]]:
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, 64),
        f"{vision}.pos_embed": (1, 1 + (image_size // 16) ** 2, 64),
        f"{vision}.patch_embed.proj.weight": (64, 3, 16, 16),
        f"{vision}.patch_embed.proj.bias": (64,),
        **_norm(f"{vision}.norm", 64),
        f"{text}.embeddings.word_embeddings.weight": (VOCABULARY, 96),
        f"{text}.embeddings.position_embeddings.weight": (64, 96),
        **_norm(f"{text}.embeddings.LayerNorm", 96),
        **_linear("blip.vision_proj", 64, 256),
        **_linear("blip.text_proj", 96, 256),
    }
    for index in range(layers):
        block = f"{vision}.blocks.{index}"
        shapes |= _norm(f"{block}.norm1", 64) | _norm(f"{block}.norm2", 64)
        shapes |= _linear(f"{block}.attn.qkv", 64, 192) | _linear(f"{block}.attn.proj", 64, 64)
        shapes |= _linear(f"{block}.mlp.fc1", 64, 256) | _linear(f"{block}.mlp.fc2", 256, 64)
        layer = f"{text}.encoder.layer.{index}"
        for name, source in (("attention", 96), ("crossattention", 64)):
            shapes |= _linear(f"{layer}.{name}.self.query", 96, 96)
            shapes |= _linear(f"{layer}.{name}.self.key", source, 96)
            shapes |= _linear(f"{layer}.{name}.self.value", source, 96)
            shapes |= _linear(f"{layer}.{name}.output.dense", 96, 96) | _norm(f"{layer}.{name}.output.LayerNorm", 96)
        shapes |= _linear(f"{layer}.intermediate.dense", 96, 192) | _linear(f"{layer}.output.dense", 192, 96)
        shapes |= _norm(f"{layer}.output.LayerNorm", 96)
    for index, place in enumerate((0, 2, 4, 6, 7)):
        shapes |= _linear(f"mlp.layers.{place}", HEAD_WIDTHS[index], HEAD_WIDTHS[index + 1])
    return shapes


def _linear(name: str, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size_out, size_in), f"{name}.bias": (size_out,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
