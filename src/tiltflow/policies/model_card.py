"""The model card of a pretrained tiny model: what it is, how it was made, how to use it."""

import json
from collections.abc import Mapping
from typing import Any

import torch

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny_sd3

A Stable Diffusion 3 of {total:.1f} M parameters that draws {size}x{size} scenes of coloured shapes.
Made from scratch by `tiltflow pretrain tiny_sd3`; good enough to be post-trained, not finished.

| part | parameters |
|---|---|
{rows}

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("tiny_sd3")
pipe(
    "a photo of a red circle left of a blue star",
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

| what | value |
|---|---|
| data | {pool:,} scenes drawn by `{source}`, seed {seed}; of training prompts only |
| autoencoder | {vae_steps:,} steps of {vae_batch}; final loss {vae_loss:.5f}; {vae_seconds:.0f} s |
| transformer and text encoders | {steps:,} steps of {batch}, flow matching; final loss {loss:.4f}; {seconds:.0f} s |
| machine | {threads} CPU threads, torch {version}, {arithmetic} |
| stored as | transformer and autoencoder float16, text encoders float32 |

```json
{config}
```
"""


def model_card(
    config: Mapping[str, Any], pipe: Any, autoencoder: Mapping[str, float], *, loss: float, seconds: float
) -> str:
    """Return the card as markdown.

    Args:
        config: The pretraining config as plain values.
        pipe: The finished pipeline.
        autoencoder: `loss` and `seconds` of its training.
        loss: Mean flow-matching loss of the last hundred steps.
        seconds: Of the flow-matching stage.
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
        total=sum(millions.values()),
        size=config["model"]["image_size"],
        rows="\n".join(f"| {name} | {count:.3f} M |" for name, count in millions.items()),
        pool=config["pool_size"],
        source=config["source"],
        seed=config["seed"],
        vae_steps=config["autoencoder"]["steps"],
        vae_batch=config["autoencoder"]["batch_size"],
        vae_loss=autoencoder["loss"],
        vae_seconds=autoencoder["seconds"],
        steps=config["steps"],
        batch=config["batch_size"],
        loss=loss,
        seconds=seconds,
        threads=torch.get_num_threads(),
        version=torch.__version__,
        arithmetic="bfloat16 autocast" if config["bf16"] else "float32",
        config=json.dumps(config, indent=1),
    )
