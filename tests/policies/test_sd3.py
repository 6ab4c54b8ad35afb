"""The SD3 policy against the stock pipeline, on a tiny random checkpoint of the real classes."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tiltflow.commands import EMBEDDED_MODELS
from tiltflow.errors import ConfigError
from tiltflow.flow import sample
from tiltflow.policies.sd3 import SD3Config, SD3Policy, load_pipeline
from tiltflow.training import SamplerConfig, rollout
from tiltflow.types import Prompt

PROMPTS = ["a photo of a red circle", "a photo of two stars", "a photo of a ring above a cross"]


def build(random_sd3, **options):
    values = {
        "model_name": str(random_sd3),
        "height": 32,
        "width": 32,
        "max_sequence_length": 1,
        "precision": "fp32",
        "lora": {"rank": 4, "alpha": 8},
        **options,
    }
    return SD3Policy(SD3Config.model_validate(values), device=torch.device("cpu"), seed=0)


def perturb(policy, scale=0.1):
    """Move theta and `ema` away from the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.weights.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    policy.weights.follow("ema", decay=0.0)


@pytest.mark.parametrize("name", ["./outputs/mine/model", "/nowhere/model", "~/model", "outputs/mine/model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^policy.model_name='{name}': no such folder; give a local folder"):
        load_pipeline(name)


def test_what_the_hub_refuses_is_told_without_advice_for_callers(tmp_path, monkeypatch):
    class Unreachable:
        @staticmethod
        def from_pretrained(name, dtype):
            raise OSError(f"{name}: pass local_files_only=False. See the stacktrace above.") from OSError("no route.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tiltflow.policies.sd3.StableDiffusion3Pipeline", Unreachable)
    for name in ("outputs/mine", "tiny_sd33"):
        with pytest.raises(ConfigError) as raised:
            load_pipeline(name)
        assert str(raised.value).startswith(
            f"policy.model_name='{name}': there is no such folder, and as the name of a hub repository it could not be "
            "loaded: no route; give a local folder"
        )


@pytest.mark.parametrize(
    ("model", "guidance_scale", "steps"),
    [("random", 1.0, 7), ("random", 4.5, 7), ("random", 2.0, 20), ("tiny_sd3", 1.5, 10), ("tiny_sd3", 4.5, 10)],
)
def test_sampling_reproduces_the_stock_pipeline(random_sd3, model, guidance_scale, steps):
    folder = random_sd3 if model == "random" else EMBEDDED_MODELS[model].folder
    policy = build(folder)
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning, negative = policy.conditioning(PROMPTS), policy.negative(3)
    expected = stock(
        prompt_embeds=conditioning.tensors["encoder_hidden_states"],
        pooled_prompt_embeds=conditioning.tensors["pooled_projections"],
        negative_prompt_embeds=negative.tensors["encoder_hidden_states"],
        negative_pooled_prompt_embeds=negative.tensors["pooled_projections"],
        latents=noise.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=32,
        width=32,
        output_type="latent",
    ).images
    with torch.no_grad(), policy.weights.using("ref"):
        ours = sample(
            policy.velocity,
            noise,
            sigmas=policy.sigmas(steps),
            conditioning=conditioning,
            negative=negative,
            guidance_scale=guidance_scale,
        ).latents
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_encoding_equals_the_stock_pipeline_call(random_sd3):
    """The same prompts, noise and steps give the same pixels as calling the stock pipeline with text."""
    policy = build(random_sd3)
    stock = StableDiffusion3Pipeline.from_pretrained(random_sd3)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    expected = stock(
        PROMPTS,
        latents=noise.clone(),
        num_inference_steps=5,
        guidance_scale=3.0,
        height=32,
        width=32,
        max_sequence_length=1,
        output_type="pt",
    ).images
    with torch.no_grad(), policy.weights.using("ref"):
        latents = sample(
            policy.velocity,
            noise,
            sigmas=policy.sigmas(5),
            conditioning=policy.conditioning(PROMPTS),
            negative=policy.negative(3),
            guidance_scale=3.0,
        ).latents
        images = policy.decode(latents)
    assert images.min() >= 0 and images.max() <= 1 and images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_each_prompt_is_encoded_once(random_sd3, monkeypatch):
    policy = build(random_sd3)
    encoded = []
    original = policy.encode
    monkeypatch.setattr(policy, "encode", lambda prompts: encoded.append(list(prompts)) or original(prompts))
    first = policy.conditioning(["a", "b", "a"])
    second = policy.conditioning(["b", "c"])
    assert encoded == [["a", "b"], ["c"]]
    assert torch.equal(first.tensors["encoder_hidden_states"][1], second.tensors["encoder_hidden_states"][0])
    assert torch.equal(first.tensors["encoder_hidden_states"][0], first.tensors["encoder_hidden_states"][2])


def encoded(policy, monkeypatch):
    """Record what the policy encodes from now on."""
    seen = []
    encode = type(policy).encode
    monkeypatch.setattr(type(policy), "encode", lambda self, prompts: seen.extend(prompts) or encode(self, prompts))
    return seen


def test_the_cache_forgets_the_oldest(random_sd3, monkeypatch):
    policy = build(random_sd3, prompt_cache_size=2)
    seen = encoded(policy, monkeypatch)
    for prompts in (["a", "b"], ["b", "c"], ["b"], ["a"]):
        assert len(policy.conditioning(prompts)) == len(prompts)
    assert seen == ["a", "b", "c", "a"]


def test_unloaded_encoders_wait_on_the_cpu_and_come_back_for_a_new_prompt(random_sd3, monkeypatch):
    moves = []
    policy = build(random_sd3, unload_text_encoders=True)
    move = type(policy)._move_text_encoders
    monkeypatch.setattr(type(policy), "_move_text_encoders", lambda self, to: moves.append(str(to)) or move(self, to))
    policy.device = torch.device("cpu", 0)
    rows = policy.conditioning(["a", "b"])
    assert moves == ["cpu:0", "cpu"]
    policy.conditioning(["b", "a"])
    assert moves == ["cpu:0", "cpu"]
    policy.conditioning(["c"])
    assert moves == ["cpu:0", "cpu"] * 2
    kept = build(random_sd3).conditioning(["a", "b"])
    assert all(torch.equal(rows.tensors[name], kept.tensors[name]) for name in kept.tensors)


def test_a_rollout_moves_the_encoders_once(random_sd3, monkeypatch):
    moves = []
    policy = build(random_sd3, unload_text_encoders=True)
    monkeypatch.setattr(type(policy), "_move_text_encoders", lambda self, to: moves.append(str(to)))
    sampler = SamplerConfig(num_steps=1, guidance_scale=2.0, batch_size=2)
    rollout(policy, [Prompt(text) for text in PROMPTS], groups=[0, 1, 2], group_size=3, sampler=sampler, seed=(0,))
    assert len(moves) == 2


def test_an_embedding_does_not_depend_on_its_batch_mates(random_sd3):
    policy = build(random_sd3)
    together, alone = policy.encode(PROMPTS), [policy.encode([prompt]) for prompt in PROMPTS]
    for name, value in together.tensors.items():
        assert torch.equal(value, torch.cat([row.tensors[name] for row in alone]))


def test_lora_starts_at_the_reference_and_trains_only_the_eight_attention_maps(random_sd3):
    policy = build(random_sd3)
    x, t = torch.randn(3, *policy.latent_shape), torch.tensor([0.2, 0.5, 1.0])
    conditioning = policy.conditioning(PROMPTS)
    with torch.no_grad():
        theta = policy.velocity(x, t, conditioning)
        with policy.weights.using("ref"):
            torch.testing.assert_close(policy.velocity(x, t, conditioning), theta, rtol=0, atol=0)
    names = {name.split(".lora_")[0].split(".", 2)[2] for name in policy.weights.trainable}
    assert names == {
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
    }
    perturb(policy)
    with torch.no_grad():
        assert (policy.velocity(x, t, conditioning) - theta).abs().max() > 1e-3
        with policy.weights.using("ref"):
            torch.testing.assert_close(policy.velocity(x, t, conditioning), theta, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in policy.weights.parameters())


def stock_velocity(pipe, x, t, conditioning):
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"],
            pooled_projections=conditioning.tensors["pooled_projections"],
        ).sample


def test_lora_export_loads_in_the_stock_pipeline(random_sd3, tmp_path):
    policy = build(random_sd3)
    perturb(policy)
    x, t = torch.randn(3, *policy.latent_shape), torch.tensor([0.2, 0.5, 1.0])
    conditioning = policy.conditioning(PROMPTS)
    with torch.no_grad(), policy.weights.using("ema"):
        policy.export(tmp_path)
        expected = policy.velocity(x, t, conditioning)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    stock = StableDiffusion3Pipeline.from_pretrained(random_sd3)
    plain = stock_velocity(stock, x, t, conditioning)
    stock.load_lora_weights(tmp_path)
    loaded = stock_velocity(stock, x, t, conditioning)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


def test_full_export_loads_in_the_stock_pipeline(random_sd3, tmp_path):
    policy = build(random_sd3, finetune="full")
    perturb(policy, scale=0.02)
    x, t = torch.randn(3, *policy.latent_shape), torch.tensor([0.2, 0.5, 1.0])
    conditioning = policy.conditioning(PROMPTS)
    with torch.no_grad(), policy.weights.using("ema"):
        policy.export(tmp_path)
        expected = policy.velocity(x, t, conditioning)
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(stock_velocity(stock, x, t, conditioning), expected, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(random_sd3):
    gradients = []
    for checkpointing in (False, True):
        policy = build(random_sd3, gradient_checkpointing=checkpointing)
        perturb(policy)
        x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
        policy.velocity(x, torch.tensor([0.2, 0.5, 1.0]), policy.conditioning(PROMPTS)).square().sum().backward()
        gradients.append([parameter.grad for parameter in policy.weights.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_bf16_velocity_is_close_to_fp32(random_sd3):
    x, t = torch.randn(3, *build(random_sd3).latent_shape), torch.tensor([0.2, 0.5, 1.0])
    exact, rough = (build(random_sd3, precision=name) for name in ("fp32", "bf16"))
    with torch.no_grad():
        a = exact.velocity(x, t, exact.conditioning(PROMPTS))
        b = rough.velocity(x, t, rough.conditioning(PROMPTS))
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.03


def test_a_model_that_is_not_there_is_explained():
    with pytest.raises(ConfigError, match=r"(?s)policy\.model_name='/nowhere'.*hub"):
        SD3Policy(SD3Config(model_name="/nowhere"), device=torch.device("cpu"), seed=0)


def test_building_a_policy_leaves_the_global_generator_alone(random_sd3):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = (build(random_sd3).weights.state() for _ in range(2))
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_weights_in_bf16_train_their_adapters(random_sd3):
    policy = build(random_sd3, precision="bf16", frozen_dtype="bf16")
    assert {parameter.dtype for parameter in policy.weights.parameters()} == {torch.float32}
    x = torch.randn(3, *policy.latent_shape)
    conditioning = policy.conditioning(PROMPTS)
    policy.velocity(x, torch.full((3,), 0.4), conditioning).square().mean().backward()
    reference = build(random_sd3)
    reference.velocity(x, torch.full((3,), 0.4), conditioning).square().mean().backward()
    for name, parameter in policy.weights.trainable.items():
        other = reference.weights.trainable[name].grad
        assert (parameter.grad is None) == (other is None)  # the last block's text side leads nowhere
        if other is not None and parameter.grad is not None and other.abs().max() > 0:
            assert torch.cosine_similarity(parameter.grad.flatten(), other.flatten(), dim=0) > 0.95
    with torch.no_grad():
        coarse, fine = (each.velocity(x, torch.full((3,), 0.4), conditioning) for each in (policy, reference))
    assert 0 < (coarse - fine).abs().max() < 0.05 * fine.abs().max()


def test_the_image_size_is_the_model_s_own_unless_given(random_sd3):
    assert build(random_sd3, height=None, width=None).latent_shape[1:] == (8, 8)
    assert build(random_sd3, height=16, width=None).latent_shape[1:] == (4, 8)


def test_an_image_that_the_position_embedding_does_not_reach_is_refused(random_sd3):
    with pytest.raises(ConfigError, match=r"policy\.width=48: the model draws at most 32 pixels"):
        build(random_sd3, width=48)


def test_embeddings_are_kept_as_the_encoders_made_them_and_given_in_float32(random_sd3):
    policy = build(random_sd3, text_encoder_dtype="bf16")
    given = policy.conditioning(PROMPTS).tensors["encoder_hidden_states"]
    kept = [row.tensors["encoder_hidden_states"].dtype for row in policy._prompt_cache._rows.values()]
    assert (given.dtype, set(kept)) == (torch.float32, {torch.bfloat16})
    assert next(policy.pipe.vae.parameters()).dtype == next(policy.transformer.parameters()).dtype == torch.float32


def test_a_scheduler_that_shifts_by_image_size_is_refused(random_sd3, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(random_sd3)
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="use_dynamic_shifting=true"):
        build(tmp_path)


def test_the_network_reads_time_in_the_scheduler_s_training_steps(random_sd3, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(random_sd3)
    pipe.scheduler.register_to_config(num_train_timesteps=500)
    pipe.save_pretrained(tmp_path)
    usual, halved = build(random_sd3), build(tmp_path)
    x, conditioning = torch.randn(3, *usual.latent_shape), usual.conditioning(PROMPTS)
    with torch.no_grad():
        expected = usual.velocity(x, torch.full((3,), 0.4), conditioning)
        torch.testing.assert_close(halved.velocity(x, torch.full((3,), 0.8), conditioning), expected)
