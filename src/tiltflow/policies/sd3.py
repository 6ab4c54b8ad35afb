"""Stable Diffusion 3 and 3.5 (and the embedded tiny one) over diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import ConfigError
from tiltflow.flow.steps import sigma_schedule
from tiltflow.policies.base import Policy
from tiltflow.policies.parameters import PolicyWeights
from tiltflow.types import DTYPES, Conditioning, Config, PathText

# The eight attention maps of every joint block that all published recipes for SD3.5 train.
ATTENTION_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class LoRAOptions(Config):
    """Low-rank adapters on the transformer."""

    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)
    targets: tuple[str, ...] = Field(default=ATTENTION_TARGETS, min_length=1)


class SD3Config(Config):
    """How a Stable Diffusion 3 pipeline is loaded and trained."""

    family: Literal["sd3"] = "sd3"
    model_name: PathText
    finetune: Literal["lora", "full"] = "lora"
    lora: LoRAOptions = LoRAOptions()
    height: int | None = Field(default=None, ge=16, multiple_of=16)  # pixels; None: what the model was made for
    width: int | None = Field(default=None, ge=16, multiple_of=16)
    max_sequence_length: int = Field(default=128, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"  # of the transformer's arithmetic; trained weights are always fp32
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"  # of the transformer's untrained weights under LoRA
    text_encoder_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    unload_text_encoders: bool = False  # they wait in main memory while they have nothing to encode
    prompt_cache_size: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "SD3Config":
        if self.precision == "fp32" and self.frozen_dtype != "fp32":
            raise ValueError(f"precision=fp32 cannot compute with frozen_dtype={self.frozen_dtype}; set it to fp32")
        if self.finetune == "full" and self.frozen_dtype != "fp32":
            raise ValueError(f"frozen_dtype={self.frozen_dtype} has no use with finetune=full; leave it out")
        return self


class SD3Policy(Policy):
    """A Stable Diffusion 3 pipeline as a policy; only its transformer is trained."""

    def __init__(self, config: SD3Config, *, device: torch.device, seed: int):
        """Load the pipeline and prepare what is trained.

        Args:
            config: The model and how it is trained.
            device: Where it computes.
            seed: Seeds the adapters' first weights.

        Raises:
            ConfigError: The model is neither a local folder nor in the hub's cache or reach, the image is larger than
                it can draw, or its scheduler shifts times by the image's size, which no Stable Diffusion 3 does.
        """
        super().__init__(prompt_cache_size=config.prompt_cache_size)
        self.config = config
        self.device = device
        self.pipe: Any = load_pipeline(config.model_name, text_encoder_dtype=DTYPES[config.text_encoder_dtype])
        if self.pipe.scheduler.config.get("use_dynamic_shifting", False):
            raise ConfigError(f"policy.model_name={config.model_name!r}: its scheduler has use_dynamic_shifting=true")
        self.transformer: Any = self.pipe.transformer
        self._freeze()
        self.weights = self._lora(seed) if config.finetune == "lora" else self._full()
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.latent_shape = self._latent_shape()

    def velocity(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return v(x_t, t, c), float32 `[B, C, h, w]`; the network reads the time in the scheduler's training steps."""
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = self.transformer(
                hidden_states=latents,
                timestep=t * self.pipe.scheduler.config.num_train_timesteps,
                encoder_hidden_states=conditioning.tensors["encoder_hidden_states"],
                pooled_projections=conditioning.tensors["pooled_projections"],
                return_dict=False,
            )
        return output[0].float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Compute prompt embeddings through the pipeline's own encoders, each prompt by itself.

        The last bits of an embedding depend on its batch mates, and a resumed run would meet others.
        """
        self._move_text_encoders(self.device)
        rows: list[Conditioning] = []
        for prompt in prompts:
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                prompt=[prompt],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.config.max_sequence_length,
            )
            rows.append(Conditioning({"encoder_hidden_states": tokens.cpu(), "pooled_projections": pooled.cpu()}))
        if self.config.unload_text_encoders:
            self._move_text_encoders(torch.device("cpu"))
        return Conditioning.cat(rows)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1], float32 `[B, 3, H, W]`."""
        scaling = self.pipe.vae.config
        decoded = self.pipe.vae.decode(latents / scaling.scaling_factor + scaling.shift_factor, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, num_steps: int) -> Tensor:
        """Return the times of the pipeline's own flow-match Euler scheduler, `[num_steps + 1]`."""
        scheduler = self.pipe.scheduler.config
        return sigma_schedule(num_steps, shift=scheduler.shift, num_train_timesteps=scheduler.num_train_timesteps).to(
            self.device
        )

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """Write the weights in use: a LoRA file for `load_lora_weights`, or a pipeline for `from_pretrained`."""
        if self.config.finetune == "full":
            self.pipe.save_pretrained(directory)
            return
        adapter = self.transformer.peft_config["default"].to_dict()
        metadata = {key: _jsonable(value) for key, value in adapter.items()}
        layers: Any = get_peft_model_state_dict(self.transformer)
        StableDiffusion3Pipeline.save_lora_weights(
            directory, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )

    def _latent_shape(self) -> tuple[int, ...]:
        network = self.transformer.config
        factor = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        largest = network.pos_embed_max_size * network.patch_size * factor
        shape: list[int] = [network.in_channels]
        for name in ("height", "width"):
            size = getattr(self.config, name) or network.sample_size * factor
            if size > largest:
                raise ConfigError(
                    f"policy.{name}={size}: the model draws at most {largest} pixels; choose a smaller size"
                )
            shape.append(size // factor)
        return tuple(shape)

    def _move_text_encoders(self, device: torch.device) -> None:
        for name in TEXT_ENCODERS:
            encoder = getattr(self.pipe, name)
            if encoder is not None:
                encoder.to(device)

    def _freeze(self) -> None:
        for name in TEXT_ENCODERS:
            encoder = getattr(self.pipe, name)
            if encoder is not None:
                encoder.requires_grad_(False).eval()
        self.pipe.vae.requires_grad_(False).eval().to(self.device, torch.float32)
        self.transformer.requires_grad_(False).eval()

    def _lora(self, seed: int) -> PolicyWeights:
        options = self.config.lora
        self.transformer.to(self.device, DTYPES[self.config.frozen_dtype])
        own = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=own):  # peft draws the first weights from the global generator
            torch.manual_seed(seed)
            self.transformer.add_adapter(
                LoraConfig(
                    r=options.rank,
                    lora_alpha=options.alpha,
                    init_lora_weights="gaussian",
                    target_modules=list(options.targets),
                )
            )
        trainable = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        for parameter in trainable.values():
            parameter.data = parameter.data.float()
        return PolicyWeights(trainable, reference=self._adapters_off)

    def _full(self) -> PolicyWeights:
        self.transformer.to(self.device, torch.float32).requires_grad_(True)
        return PolicyWeights(dict(self.transformer.named_parameters()))

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()


def load_pipeline(model_name: str, *, text_encoder_dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """Load a stock pipeline from a folder or the hub, in float32 but for its text encoders.

    Raises:
        ConfigError: There is no such folder and the hub does not know or give it.
    """
    remedy = (
        "give a local folder in diffusers format, the name of a hub repository that you may access (gated ones need "
        "`hf auth login`), or 'tiny_sd3' for the embedded model"
    )
    if not Path(model_name).exists() and (model_name.startswith(("/", ".", "~")) or model_name.count("/") > 1):
        raise ConfigError(f"policy.model_name={model_name!r}: no such folder; {remedy}")
    disable_progress_bar()
    dtypes = {"default": torch.float32} | dict.fromkeys(TEXT_ENCODERS, text_encoder_dtype)
    try:
        return StableDiffusion3Pipeline.from_pretrained(model_name, dtype=dtypes)
    except (OSError, ValueError) as error:
        # The hub's own refusal is the cause; what diffusers says around it is advice for who calls it directly.
        reason = str(error.__cause__ or error).rstrip(".")
        problem = "could not be loaded as a Stable Diffusion 3 pipeline"
        if not Path(model_name).exists():
            problem = "there is no such folder, and as the name of a hub repository it could not be loaded"
        raise ConfigError(f"policy.model_name={model_name!r}: {problem}: {reason}; {remedy}") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return value
