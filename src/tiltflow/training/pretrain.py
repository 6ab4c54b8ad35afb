"""Pretraining from scratch: an autoencoder by reconstruction, then a text-to-image model by flow matching.

Flow matching (Lipman et al. 2023; Esser et al. 2024, eq. 2) regresses the velocity of the linear path,

    L = E || v_theta(x_t, t, c) - (eps - x0) ||^2,    t ~ logit-normal(0, 1),

with the caption c replaced by the empty one now and then, so that classifier-free guidance works.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.errors import ConfigError
from tiltflow.flow.paths import interpolate, logit_normal_times
from tiltflow.policies.model_card import machine, model_card
from tiltflow.policies.sd3 import load_pipeline
from tiltflow.policies.tiny_sd3 import TinySD3Config, build_tiny_sd3, save_compact, text_embeddings
from tiltflow.runtime.checkpoint import CheckpointStore, load_state, load_tensors, save_state, save_tensors
from tiltflow.runtime.files import make_folder, replacing_folder, write_atomically
from tiltflow.runtime.randomness import generator
from tiltflow.types import Beta, Config, PathText, PathTextOrNone

CONFIG_FILE = "pretrain.json"
PHASES_FILE = "training.json"

Log = Callable[[str, int, float], None]


class CaptionedImages(Protocol):
    """A source of training pairs; made without arguments."""

    captions: Sequence[str]  # every caption that can occur: the tokenizer's vocabulary

    def draw(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """Return images, uint8 `[count, 3, H, W]`, and their captions, the same for the same seed."""
        ...


class AutoencoderTraining(Config):
    """Reconstruction training of the autoencoder."""

    steps: int = Field(default=2_400, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    kl_weight: float = Field(default=1e-6, ge=0)
    pool_size: int = Field(default=20_000, ge=1)


class PretrainConfig(Config):
    """Everything that decides a pretraining run."""

    name: str = "tiny_sd3"  # of the model, on its card
    output_dir: PathText = "outputs/tiny_sd3"
    source: str = "tiltflow.demo.dataset:DrawnScenes"
    init_from: PathTextOrNone = None
    seed: int = 0
    model: TinySD3Config = TinySD3Config()
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    steps: int = Field(default=5_000, ge=1)
    batch_size: int = Field(default=64, ge=4)
    lr: float = Field(default=8e-4, gt=0)
    warmup_steps: int = Field(default=200, ge=1)
    final_lr_fraction: float = Field(default=0.02, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    # Every so many steps a quarter batch sees the stock pipeline's 256 silent T5 tokens.
    long_context_every: int = Field(default=20, ge=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    pool_size: int = Field(default=80_000, ge=1)
    bf16: bool = True
    save_every: int = Field(default=500, ge=1)


def pretrain(config: PretrainConfig, *, log: Log) -> Path:
    """Make a model from scratch, or train one further; run again after an interruption, it goes on where it was.

    Args:
        config: The run. With `init_from`, a finished checkpoint of an earlier run, the autoencoder and the tokenizer
            stay as they are and the transformer and text encoders are trained further: one more phase.
        log: Called as `log(stage, step, loss)`.

    Returns:
        The folder of the finished checkpoint, which the stock pipeline's `from_pretrained` loads.

    Raises:
        ConfigError: The source or `init_from` cannot be read, or `output_dir` holds a run of another config.
        CheckpointError: The system refuses to write.
    """
    run_dir = Path(config.output_dir)
    source = _source(config.source)
    phases: list[dict[str, Any]] = []
    if config.init_from is None:
        pipe: Any = build_tiny_sd3(config.model, source.captions, seed=config.seed)
    else:
        pipe = _earlier_phase(config.init_from)
        phases = _phases(Path(config.init_from) / PHASES_FILE)
    _claim(run_dir, config)
    images, captions = source.draw(config.pool_size, seed=config.seed)
    latents, made = _prepare(pipe, images, config, store=CheckpointStore(run_dir / "autoencoder", keep=1), log=log)
    loss, seconds = train_transformer(
        pipe, latents, captions, config, store=CheckpointStore(run_dir / "transformer", keep=1), log=log
    )
    # A further phase takes model and autoencoder as they are: its config says nothing about them.
    unused = {"model", "autoencoder"} if config.init_from is not None else set[str]()
    used = config.model_dump(mode="json", exclude=unused)
    phases.append({**made, "loss": loss, "seconds": seconds, **machine(), "config": used})
    card = model_card(pipe, phases, name=config.name, example=source.captions[0])
    return _publish(pipe, phases, card, run_dir)


def _publish(pipe: Any, phases: list[dict[str, Any]], card: str, run_dir: Path) -> Path:
    """Write the finished model whole or not at all; return its folder."""
    final = run_dir / "model"
    with replacing_folder(final) as folder:
        save_compact(pipe, folder)
        (folder / PHASES_FILE).write_text(json.dumps(phases, indent=1))
        (folder / "README.md").write_text(card)
    return final


def _earlier_phase(folder: str) -> Any:
    """Load the model of an earlier phase."""
    try:
        return load_pipeline(folder)
    except ConfigError as error:
        raise ConfigError(
            f"init_from={folder!r} holds no finished model; run the earlier phase first (such as: tiltflow pretrain "
            "tiny_sd3), or give the folder of another model that was pretrained here"
        ) from error


def _claim(run_dir: Path, config: PretrainConfig) -> None:
    """Write the config into the run's folder, or compare it with the one that is there."""
    path = run_dir / CONFIG_FILE
    now = config.model_dump(mode="json")
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in now if key != "save_every" and before.get(key) != now[key])
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{run_dir} holds another pretraining run ({key}: {before.get(key)!r} -> {now[key]!r}); choose another "
                "output_dir, or keep the value to go on with it"
            )
    make_folder(run_dir)
    write_atomically(path, json.dumps(now, indent=1))


def _phases(path: Path) -> list[dict[str, Any]]:
    """Return how a checkpoint was made so far."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"init_from={str(path.parent)!r}: {path.name} cannot be read ({error}); give the model folder of an "
            "earlier pretraining"
        ) from error


def _prepare(
    pipe: Any, images: Tensor, config: PretrainConfig, *, store: CheckpointStore, log: Log
) -> tuple[Tensor, dict[str, float]]:
    """Make or restore the autoencoder and the scaled latents of the image pool; return also how it was made."""
    done = store.latest(on_skip=lambda message: print(f"warning: {message}"))
    if done is None:
        began = time.perf_counter()
        facts: dict[str, float] = {}
        if config.init_from is None:
            pool = images[: config.autoencoder.pool_size]
            facts["autoencoder_loss"] = train_autoencoder(
                pipe.vae, pool, config.autoencoder, seed=config.seed, bf16=config.bf16, log=log
            )
        latents, shift, scale = encode_pool(pipe.vae, images)
        if config.init_from is not None:
            latents = (latents / scale + shift - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
            shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
        facts |= {"shift": shift, "scale": scale, "autoencoder_seconds": time.perf_counter() - began}
        done = store.save(config.autoencoder.steps, lambda path: _save_prepared(path, pipe.vae, latents, facts))
    pipe.vae.load_state_dict(load_tensors(done / "vae.safetensors"))
    made: Any = load_state(done, "facts")
    pipe.vae.register_to_config(shift_factor=made["shift"], scaling_factor=made["scale"])
    return load_tensors(done / "latents.safetensors")["latents"], made


def train_autoencoder(
    vae: Any, images: Tensor, config: AutoencoderTraining, *, seed: int, bf16: bool, log: Log
) -> float:
    """Train an `AutoencoderKL` to reconstruct images and return the mean loss of the last hundred steps.

    Args:
        vae: Trained in place.
        images: `[N, 3, H, W]`, uint8.
        config: Steps, batch and rates.
        seed: Seeds the batches and the posterior noise.
        bf16: Run the forward pass under bfloat16 autocast.
        log: Called as `log("autoencoder", step, loss)`.
    """
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    recent: list[float] = []
    for step in range(config.steps):
        _set_lr(optimizer, config.lr * _warmup_cosine(step, warmup=100, total=config.steps, final=0.02))
        index = torch.randint(len(images), (config.batch_size,), generator=draws)
        pixels = images[index].float() / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator=draws)).sample
        error = decoded.float() - pixels
        loss = error.square().mean() + 0.5 * error.abs().mean() + config.kl_weight * posterior.kl().float().mean()
        _descend(loss, optimizer, list(vae.parameters()), max_norm=1.0)
        recent = [*recent[-99:], loss.item()]
        log("autoencoder", step, loss.item())
    return sum(recent) / len(recent)


@torch.no_grad()
def encode_pool(vae: Any, images: Tensor) -> tuple[Tensor, float, float]:
    """Encode uint8 images `[N, 3, H, W]` to latents of mean 0 and std 1; return them with their shift and scale."""
    latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(256)])
    shift, scale = round(latents.mean().item(), 5), round(1 / latents.std().item(), 5)
    return (latents - shift) * scale, shift, scale


def train_transformer(
    pipe: Any,
    latents: Tensor,
    captions: list[str],
    config: PretrainConfig,
    *,
    store: CheckpointStore,
    log: Log,
) -> tuple[float, float]:
    """Train transformer and CLIP encoders by flow matching; leave their moving average in `pipe`.

    Args:
        pipe: The pipeline whose transformer and text encoders are trained in place.
        latents: Scaled latents, `[N, C, h, w]`.
        captions: One per latent.
        config: The run.
        store: Where the run's state is kept, and continued from.
        log: Called as `log("transformer", step, loss)`.

    Returns:
        Mean loss of the last hundred steps, and the seconds of training, those before an interruption included.
    """
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    average = [parameter.detach().clone() for parameter in parameters]
    progress: dict[str, Any] = {"step": 0, "recent": [], "seconds": 0.0}
    checkpoint = store.latest(on_skip=lambda message: print(f"warning: {message}"))
    if checkpoint is not None:
        progress = _load_training(checkpoint, modules, optimizer, average)
    began = time.perf_counter() - progress["seconds"]
    recent: list[float] = progress["recent"]
    for step in range(progress["step"], config.steps):
        factor = _warmup_cosine(step, config.warmup_steps, config.steps, config.final_lr_fraction)
        _set_lr(optimizer, config.lr * factor)
        loss = _flow_matching_loss(pipe, latents, captions, config, step=step)
        _descend(loss, optimizer, parameters, max_norm=config.max_grad_norm)
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        recent = [*recent[-99:], loss.item()]
        log("transformer", step, loss.item())
        if (step + 1) % config.save_every == 0:
            progress = {"step": step + 1, "recent": recent, "seconds": time.perf_counter() - began}
            write = partial(_save_training, modules=modules, optimizer=optimizer, average=average, progress=progress)
            store.save(step + 1, write)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    return sum(recent) / len(recent), time.perf_counter() - began


def _flow_matching_loss(
    pipe: Any, latents: Tensor, captions: list[str], config: PretrainConfig, *, step: int
) -> Tensor:
    """Return the loss of one step's batch; all that is random in it follows from the seed and the step."""
    draws = generator(config.seed, "pretrain", step)
    is_long = config.long_context_every > 0 and step % config.long_context_every == 0
    count = config.batch_size // 4 if is_long else config.batch_size
    index = torch.randint(len(latents), (count,), generator=draws)
    keep = torch.rand(count, generator=draws) >= config.caption_dropout
    prompts: list[str] = [captions[i] if k else "" for i, k in zip(index.tolist(), keep.tolist(), strict=True)]
    x0 = latents[index]
    eps = torch.randn(x0.shape, generator=draws)
    t = logit_normal_times(count, generator=draws)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
        tokens, pooled = text_embeddings(pipe, prompts, t5_tokens=256 if is_long else 1)
        velocity = pipe.transformer(
            hidden_states=interpolate(x0, eps, t),
            timestep=t * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
        ).sample
    return F.mse_loss(velocity.float(), eps - x0)


def _descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *, max_norm: float
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _warmup_cosine(step: int, warmup: int, total: int, final: float) -> float:
    """Return the learning-rate factor: linear warm-up, then half a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _save_prepared(path: Path, vae: Any, latents: Tensor, facts: dict[str, float]) -> None:
    save_tensors(path / "vae.safetensors", vae.state_dict())
    save_tensors(path / "latents.safetensors", {"latents": latents})
    save_state(path, "facts", facts)


def _save_training(
    path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor], progress: dict[str, Any]
) -> None:
    save_tensors(path / "modules.safetensors", modules.state_dict())
    save_tensors(path / "average.safetensors", {f"{index:04d}": tensor for index, tensor in enumerate(average)})
    save_state(path, "optimizer", optimizer.state_dict())
    save_state(path, "progress", progress)


def _load_training(
    path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]
) -> dict[str, Any]:
    modules.load_state_dict(load_tensors(path / "modules.safetensors"))
    for name, tensor in load_tensors(path / "average.safetensors").items():
        average[int(name)].copy_(tensor)
    optimizer_state: Any = load_state(path, "optimizer")
    optimizer.load_state_dict(optimizer_state)
    progress: Any = load_state(path, "progress")
    return progress


def _source(path: str) -> CaptionedImages:
    module, _, name = path.partition(":")
    try:
        return vars(import_module(module))[name]()
    except (ImportError, KeyError, ValueError) as error:
        raise ConfigError(
            f"source={path!r} cannot be made: {type(error).__name__}: {error}; write package.module:Class"
        ) from error
