"""The model card of a pretrained tiny model: what it is, how it was made, how to use it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A Stable Diffusion 3 of {total:.1f} M parameters for {size}x{size} images such as
`{example}`.
Made from scratch by `tiltflow pretrain {name}`; good enough to be post-trained, not finished.

| part | parameters |
|---|---|
{rows}

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{name}")
pipe(
    {example!r},
    height={size},
    width={size},
    guidance_scale=2.0,
    num_inference_steps=20,
    max_sequence_length=1,
).images[0]
```

The third text encoder is there because the stock loader wants one; it answers zeros whatever the prompt, so
`max_sequence_length=1` loses nothing and is several times faster than the pipeline's default of 256.

## Training

{phases}

Stored: transformer and autoencoder in float16, text encoders in float32. `training.json` holds the settings
that each phase used.
"""


def model_card(pipe: Any, phases: Sequence[Mapping[str, Any]], *, name: str, example: str) -> str:
    """Return the card as markdown.

    Args:
        pipe: The finished pipeline.
        phases: One entry per pretraining run, the first from scratch; each has `loss`, `seconds`, `threads`, `torch`
            and `config`, the first also `autoencoder_loss` and `autoencoder_seconds`; `note` is optional.
        name: What the model is called.
        example: A prompt that it knows.
    """
    modules = {
        "transformer": pipe.transformer,
        "autoencoder": pipe.vae,
        "text encoder 1": pipe.text_encoder,
        "text encoder 2": pipe.text_encoder_2,
        "silent T5": pipe.text_encoder_3,
    }
    millions = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in modules.items()}
    return _CARD.format(
        name=name,
        example=example,
        total=sum(millions.values()),
        size=pipe.vae.config.sample_size,
        rows="\n".join(f"| {name} | {count:.3f} M |" for name, count in millions.items()),
        phases="\n\n".join(_phase(number, phase) for number, phase in enumerate(phases, start=1)),
    )


def machine() -> dict[str, Any]:
    """Return what the time of a run depends on."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def _phase(number: int, phase: Mapping[str, Any]) -> str:
    config = phase["config"]
    rows = {
        "data": f"{config['pool_size']:,} images drawn by `{config['source']}`; of training prompts only",
        "seed": config["seed"],
        "transformer and text encoders": f"{config['steps']:,} steps of {config['batch_size']}, learning rate "
        f"{config['lr']}, flow matching; final loss {phase['loss']:.4f}; {phase['seconds']:.0f} s",
        "machine": f"{phase['threads']} CPU threads, torch {phase['torch']}, "
        + ("bfloat16 autocast" if config["bf16"] else "float32"),
    }
    if "autoencoder_loss" in phase:
        training = config["autoencoder"]
        rows["autoencoder"] = (
            f"{training['steps']:,} steps of {training['batch_size']}; final loss {phase['autoencoder_loss']:.5f}; "
            f"{phase['autoencoder_seconds']:.0f} s with encoding"
        )
    if "note" in phase:
        rows["note"] = phase["note"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    start = "from scratch" if config["init_from"] is None else "from the phase before"
    return f"Phase {number}, {start}:\n\n| what | value |\n|---|---|\n{table}"
