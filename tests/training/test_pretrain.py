"""Pretraining: it learns, it resumes exactly, and what it writes is a stock pipeline with a model card."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.tiny import SIZES
from tiltflow.errors import ConfigError
from tiltflow.training.pretrain import AutoencoderTraining, PretrainConfig, pretrain


def small(tmp_path, **options):
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": SIZES.model_copy(update={"image_size": 64, "vae_channels": (8, 8, 8)}),
        "autoencoder": AutoencoderTraining(steps=40, batch_size=4, pool_size=8, lr=1e-2),
        "steps": 8,
        "batch_size": 8,
        "warmup_steps": 2,
        "lr": 3e-3,
        "pool_size": 8,
        "bf16": False,
        "long_context_every": 4,
        "save_every": 3,
        **options,
    }
    return PretrainConfig.model_validate(values)


def test_pretraining_writes_a_stock_pipeline_and_its_losses_fall(tmp_path):
    losses = {"autoencoder": [], "transformer": []}
    final = pretrain(small(tmp_path), log=lambda stage, step, loss: losses[stage].append(loss))
    assert [len(values) for values in losses.values()] == [40, 8]
    assert losses["autoencoder"][-1] < 0.7 * losses["autoencoder"][0]
    assert losses["transformer"][-1] < losses["transformer"][0]
    pipe = StableDiffusion3Pipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a ring", height=64, width=64, num_inference_steps=2, max_sequence_length=1).images[0]
    assert image.size == (64, 64)
    card = (final / "README.md").read_text()
    assert "| seed | 0 |" in card and "tiltflow pretrain tiny_sd3" in card and "final loss" in card


class Killed(Exception):
    pass


def test_an_interrupted_pretraining_ends_with_the_same_weights(tmp_path):
    whole = pretrain(small(tmp_path / "a"), log=lambda *_: None)

    def killer(stage, step, loss):
        if (stage, step) == ("transformer", 4):
            raise Killed

    with pytest.raises(Killed):
        pretrain(small(tmp_path / "b"), log=killer)
    steps = []
    resumed = pretrain(small(tmp_path / "b"), log=lambda stage, step, loss: steps.append((stage, step)))
    assert steps[0] == ("transformer", 3)
    for part in ("transformer", "text_encoder", "vae"):
        a, b = (
            StableDiffusion3Pipeline.from_pretrained(path).components[part].state_dict() for path in (whole, resumed)
        )
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_of_another_pretraining_is_refused(tmp_path):
    first = pretrain(small(tmp_path), log=lambda *_: None)
    with pytest.raises(ConfigError, match=r"holds another pretraining run \(lr: 0\.003 -> 0\.1\)"):
        pretrain(small(tmp_path, lr=0.1), log=lambda *_: None)
    with pytest.raises(ConfigError, match=r"holds another pretraining run \(init_from: None"):
        pretrain(small(tmp_path, init_from=str(first)), log=lambda *_: None)


def test_a_further_phase_is_recorded_beside_the_first(tmp_path):
    first = pretrain(small(tmp_path / "a"), log=lambda *_: None)
    second = pretrain(small(tmp_path / "b", init_from=str(first), seed=1), log=lambda *_: None)
    phases = json.loads((second / "training.json").read_text())
    assert [phase["config"]["seed"] for phase in phases] == [0, 1]
    vaes = [StableDiffusion3Pipeline.from_pretrained(path).vae.state_dict() for path in (first, second)]
    assert all(torch.equal(vaes[0][name], vaes[1][name]) for name in vaes[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "no_such_module:Scenes"}, "source='no_such_module:Scenes' cannot be made: ModuleNotFoundError"),
        (
            {"source": "tiltflow.demo.dataset:Nothing"},
            "cannot be made: KeyError: 'Nothing'; write package.module:Class",
        ),
        ({"init_from": "nowhere"}, "init_from='nowhere' holds no finished model; run the earlier phase first"),
    ],
)
def test_what_pretraining_cannot_read_is_named(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(small(tmp_path, **options), log=lambda *_: None)
    assert not (tmp_path / "run").exists()


def test_a_model_that_was_not_pretrained_here_cannot_be_trained_further(tmp_path, random_sd3):
    with pytest.raises(ConfigError, match=r"training\.json cannot be read"):
        pretrain(small(tmp_path, init_from=str(random_sd3)), log=lambda *_: None)
