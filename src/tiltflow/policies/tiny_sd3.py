"""A tiny, untrained Stable Diffusion 3 of the real classes: made here, trained by `tiltflow pretrain tiny_sd3`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tiltflow.scorers.clip_tokenizer import build_tokenizer
from tiltflow.types import Config


class TinySD3Config(Config):
    """Sizes of the tiny model; the defaults give 6 M parameters in 64 image tokens and 16 text tokens."""

    image_size: int = 64
    vae_channels: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    patch_size: int = 2
    layers: int = 4
    heads: int = 3
    head_dim: int = 64
    text_tokens: int = 16
    tokens: Literal["words", "letters"] = "words"  # letters, where the picture shows how a word is spelt
    text_widths: tuple[int, int] = (128, 64)
    text_layers: tuple[int, int] = (3, 2)
    shift: float = 1.0


def build_tiny_sd3(config: TinySD3Config, captions: Sequence[str], *, seed: int) -> StableDiffusion3Pipeline:
    """Build the pipeline with random weights and a tokenizer for `captions`.

    Args:
        config: Sizes.
        captions: Text whose every word becomes one token, unless `config.tokens` is "letters".
        seed: Seeds the initial weights.

    Returns:
        A stock pipeline. Its T5 encoder answers zeros (see `_silent_t5`), so `max_sequence_length=1` loses nothing.
    """
    with torch.random.fork_rng(devices=[]):  # the classes draw their first weights from the global generator
        torch.manual_seed(seed)
        return _build(config, captions)


def _build(config: TinySD3Config, captions: Sequence[str]) -> StableDiffusion3Pipeline:
    known = captions if config.tokens == "words" else ()
    tokenizer = build_tokenizer(known, max_length=config.text_tokens)
    first, second = (
        _text_encoder(tokenizer, width, layers, config.text_tokens)
        for width, layers in zip(config.text_widths, config.text_layers, strict=True)
    )
    width = config.heads * config.head_dim
    downsampling = 2 ** (len(config.vae_channels) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=config.image_size // downsampling,
        patch_size=config.patch_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=sum(config.text_widths),
        caption_projection_dim=width,
        pooled_projection_dim=sum(config.text_widths),
        pos_embed_max_size=config.image_size // downsampling // config.patch_size,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=build_autoencoder(config),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=_silent_t5(sum(config.text_widths)),
        tokenizer_3=T5Tokenizer(extra_ids=0),
    )


def build_autoencoder(config: TinySD3Config) -> AutoencoderKL:
    """Build the convolutional autoencoder with random weights; each entry of `vae_channels` but one halves the size."""
    stages = len(config.vae_channels)
    # diffusers annotates these three as tuples of one
    return AutoencoderKL(
        block_out_channels=config.vae_channels,  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * stages,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * stages,  # pyright: ignore[reportArgumentType]
        latent_channels=config.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=config.image_size,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def text_embeddings(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], *, t5_tokens: int) -> tuple[Tensor, Tensor]:
    """Encode prompts with gradient, as the pipeline does without: `[B, L + t5_tokens, D]` and pooled `[B, P]`."""
    tokens, pooled = [], []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        batch = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(batch.input_ids, output_hidden_states=True)
        tokens.append(output.hidden_states[-2])
        pooled.append(output[0])
    joint = torch.cat(tokens, dim=-1)
    silent = joint.new_zeros(len(joint), t5_tokens, joint.shape[-1])
    return torch.cat([joint, silent], dim=1), torch.cat(pooled, dim=-1)


def save_compact(pipe: StableDiffusion3Pipeline, directory: Path) -> None:
    """Write the pipeline for `from_pretrained`: transformer and autoencoder in half precision, the rest as it is."""
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(directory)


def _silent_t5(width: int) -> T5EncoderModel:
    """Build the T5 encoder that the stock loader insists on; its final norm is zero, and so is all that it says.

    Stable Diffusion 3 without T5 sees zeros in the place of its tokens: this encoder gives the same.
    """
    config = T5Config(vocab_size=8, d_model=width, d_kv=16, d_ff=16, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def _text_encoder(tokenizer: Any, width: int, layers: int, tokens: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokens,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
