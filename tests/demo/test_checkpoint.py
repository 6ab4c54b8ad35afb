"""The packaged tiny models: stock classes, small enough for git, and good enough to be tilted."""

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tiltflow.commands import EMBEDDED_MODELS, run_evaluation
from tiltflow.config import load_run_config
from tiltflow.demo.prompts import all_prompts

NAMES = ("tiny_sd3", "tiny_words")


def loaded(name: str) -> Any:
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(EMBEDDED_MODELS[name].folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=NAMES)
def pipe(request):
    return loaded(request.param)


def test_the_stock_pipeline_loads_it_with_the_real_classes(pipe):
    assert type(pipe.transformer) is SD3Transformer2DModel
    assert type(pipe.vae) is AutoencoderKL
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert type(pipe.text_encoder) is CLIPTextModelWithProjection
    assert type(pipe.tokenizer) is CLIPTokenizer


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name):
    pipe = loaded(name)
    modules = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) <= 8_000_000
    files = [path for path in EMBEDDED_MODELS[name].folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000


@pytest.mark.parametrize("name", NAMES)
def test_its_card_records_seed_config_time_and_loss(name):
    model = EMBEDDED_MODELS[name].folder
    phases = json.loads((model / "training.json").read_text())
    assert all(phase["loss"] > 0 and phase["seconds"] > 0 and phase["config"]["seed"] >= 0 for phase in phases)
    card = (model / "README.md").read_text()
    assert all(f"{phase['loss']:.4f}" in card for phase in phases)


def test_every_caption_fits_and_every_word_is_one_token():
    pipe = loaded("tiny_sd3")
    for line in all_prompts():
        ids = pipe.tokenizer(line["prompt"]).input_ids
        assert len(ids) == len(line["prompt"].split()) + 2 <= pipe.tokenizer.model_max_length


def test_the_silent_t5_says_nothing(pipe):
    tokens, _, _, _ = pipe.encode_prompt("a ring", None, None, do_classifier_free_guidance=False, max_sequence_length=9)
    assert tokens.shape[1] == pipe.tokenizer.model_max_length + 9
    assert torch.count_nonzero(tokens[:, pipe.tokenizer.model_max_length :]) == 0


@pytest.mark.slow
def test_strict_geneval_on_held_out_prompts_leaves_room_to_tilt(tmp_path):
    demo = load_run_config("shapes_ram").evaluation
    result = run_evaluation(
        checkpoint=None,
        model_name="tiny_sd3",
        prompts="shapes",
        rewards="[Geneval]",
        overrides=[(key, str(getattr(demo, key))) for key in type(demo).model_fields],
        output_dir=tmp_path,
    )
    assert 0.30 <= result.summary["geneval_strict"].value <= 0.75
