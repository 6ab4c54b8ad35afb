"""Image-text reward models: the reward, its gradient, what learns, the losses as sums, and files that others read."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tests.invariant.runs import launch
from tests.reward_training.pairs import LABELS, PROMPTS, levels, pair_batch, rows_of, tiny_model
from tests.scorers.test_preprocess import drawn, stats
from tests.scorers.tiny_clip import save_clip, tiny_backbone
from tests.shared import case_tensors, golden, requires_shared
from tiltflow.errors import GeometryError, RewardError
from tiltflow.reward_training import CLIPRewardModel, PickscoreRewardModel, get_reward_model, preference_kl
from tiltflow.reward_training.image_text_fit import ImageTextModelConfig, build_model
from tiltflow.reward_training.preference import pickscore_criterion
from tiltflow.rewards import build_reward
from tiltflow.scorers import ClipScorer
from tiltflow.scorers.clip_new import ClipSizes
from tiltflow.scorers.clip_tokenizer import build_tokenizer
from tiltflow.scorers.preprocess import clip_preprocess_levels

SMALL = ClipSizes(
    image_size=16, patch_size=8, vision_width=16, vision_layers=1, text_width=16, text_layers=1, embedding=8
)


# --- the reward -------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_scaled_cosine_of_its_own_pair() -> None:
    model = tiny_model().eval()
    pixels, tokens = model.preprocess(levels(4), PROMPTS[:4])
    with torch.no_grad():
        rewards = model.model.get_reward(pixels, tokens)
        logits = model.model.backbone.model(input_ids=tokens, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(rewards, logits.diagonal(), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.model(pixels, tokens), rewards)
    assert rewards.shape == (4,)
    assert rewards.std() > 1


def test_a_new_model_starts_at_the_published_scale() -> None:
    model = build_model(ImageTextModelConfig(from_scratch=SMALL), PROMPTS, seed=0)
    assert model.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    assert model.model.logit_scale.requires_grad
    assert isinstance(model.model.logit_scale, torch.nn.Parameter)


def test_a_new_model_is_the_same_for_the_same_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_model(ImageTextModelConfig(from_scratch=SMALL), PROMPTS, seed=seed)
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    before = torch.random.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_new_tokenizer_is_the_same_each_time() -> None:
    """Every process makes its own, and so does a run that goes on."""
    draws = random.Random(0)
    words = ["".join(draws.choices("abcdefgh", k=draws.randint(2, 9))) for _ in range(3000)]
    first, second, third = (build_tokenizer(words, max_length=16) for _ in range(3))
    assert first.get_vocab() == second.get_vocab() == third.get_vocab()
    assert first(words)["input_ids"] == second(words)["input_ids"] == third(words)["input_ids"]
    assert len(first) == 2000
    lengths = [len(ids) for ids in first(words)["input_ids"]]
    assert min(lengths) == 3  # a common word is one token between both ends
    assert max(lengths) > 3  # a rare one is several


def test_the_reward_is_the_same_in_any_micro_batch_and_company() -> None:
    model = tiny_model().eval()
    images = [levels(1, seed=place, height=30 + 3 * place)[0].float() for place in range(5)]
    with torch.no_grad():
        alone = torch.cat([model.get_reward([image], [text]) for image, text in zip(images, PROMPTS, strict=True)])
        for size in (None, 1, 2, 3, 9):
            model.micro_batch_size = size
            torch.testing.assert_close(model.get_reward(images, PROMPTS), alone, atol=1e-4, rtol=0)
        assert model.get_reward([], []).shape == (0,)


def test_the_gradient_of_the_reward_reaches_the_pixels() -> None:
    model = tiny_model().eval().double()
    images = levels(2).double().requires_grad_()

    def reward(values: torch.Tensor) -> torch.Tensor:
        return model.get_reward(values, PROMPTS[:2]).sum()

    (exact,) = torch.autograd.grad(reward(images), images)
    assert reward(images).dtype == torch.float64
    assert exact.abs().amax(dim=(1, 2, 3)).min() > 1e-4
    for place in ((0, 3, 5, 0), (0, 20, 24, 1), (1, 11, 40, 2)):
        shift = torch.zeros_like(images)
        shift[place] = 1e-3
        with torch.no_grad():
            difference = (reward(images + shift) - reward(images - shift)).item() / 2e-3
        assert difference == pytest.approx(exact[place].item(), rel=1e-6, abs=1e-10)
    model.float()
    model.get_reward(rough := images.detach().float().requires_grad_(), PROMPTS[:2]).sum().backward()
    assert rough.grad is not None
    torch.testing.assert_close(rough.grad.double(), exact, atol=1e-3 * exact.abs().max().item(), rtol=0)


@requires_shared
@pytest.mark.parametrize("index", range(5))
def test_pixels_are_preprocessed_as_the_reference_does(index: int) -> None:
    meta, tensors = golden("algorithms/clip_preprocess")
    expected = case_tensors(tensors, index)
    image = drawn(meta["cases"][index]).float().requires_grad_()
    output = clip_preprocess_levels([image])
    (output**2).mean().backward()
    torch.testing.assert_close(output[0, :, ::16, ::16], expected["output_every_16"], atol=2e-4, rtol=0)
    torch.testing.assert_close(stats(output.detach())[:2], expected["output_stats"][:2], atol=1e-5, rtol=0)
    assert image.grad is not None
    largest = expected["grad_stats"][3:].abs().max().item()
    torch.testing.assert_close(image.grad[::8, ::8], expected["grad_every_8"], atol=1e-3 * largest, rtol=0)


def test_levels_as_a_batch_and_as_a_list_are_the_same() -> None:
    images = levels(3).float()
    torch.testing.assert_close(clip_preprocess_levels(images, size=16), clip_preprocess_levels(list(images), size=16))


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (torch.zeros(2, 8, 8, 3), ["cat"], "2 images with 1 captions"),
        (torch.zeros(2, 3, 8, 8), ["cat", "dog"], r"an image is \[3, 8, 8\]; pass \[H, W, 3\]"),
        (torch.zeros(8, 8, 3), ["cat"] * 8, r"an image is \[8, 3\]"),
        ([torch.zeros(8, 8)], ["cat"], r"an image is \[8, 8\]"),
    ],
)
def test_wrong_input_is_told(images: Any, captions: list[str], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        tiny_model().get_reward(images, captions)


def test_wrong_input_of_the_towers_is_told() -> None:
    model = tiny_model().model
    with pytest.raises(RewardError, match=r"pass \[B, 3, 32, 32\] and \[B, L\]"):
        model.get_reward(torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, dtype=torch.int64))


# --- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["vision", "text", "logit_scale", None])
def test_what_is_frozen_stays(frozen: str | None) -> None:
    model = tiny_model(**({f"freeze_{frozen}": True} if frozen else {}))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2, weight_decay=0.1)
    loss, _ = model(pair_batch())
    loss.backward()
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    parts = {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
    still = parts.get(frozen or "", ("logit_scale",) if frozen else ())
    assert {name for name in before if any(part in name for part in still)} == before.keys() - moved
    vision, text = model.model.backbone.model.vision_model, model.model.backbone.model.text_model
    assert (vision.training, text.training) == (frozen != "vision", frozen != "text")
    model.prepare_for_validation_step()
    assert not any(module.training for module in model.modules())
    model.finish_validation_step()
    assert (vision.training, text.training) == (frozen != "vision", frozen != "text")


def test_a_model_of_which_nothing_learns_is_refused() -> None:
    with pytest.raises(RewardError, match="leave nothing to learn"):
        tiny_model(freeze_vision=True, freeze_text=True, freeze_logit_scale=True)
    with pytest.raises(ValueError, match="leave nothing to learn"):
        ImageTextModelConfig(pretrained="x", freeze_vision=True, freeze_text=True, freeze_logit_scale=True)


def test_checkpointing_activations_changes_nothing(tmp_path: Path) -> None:
    folder, gradients = save_clip(tmp_path / "clip"), []
    for checkpointing in (False, True):
        model = build_model(ImageTextModelConfig(pretrained=str(folder)), [], seed=0)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(pair_batch())[0].backward()
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
        assert model.model.backbone.model.vision_model.encoder.gradient_checkpointing == checkpointing
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_divergence() -> None:
    model, batch = tiny_model(), pair_batch()
    loss, totals = model(batch)
    rewards = [model.get_reward(batch[key], batch["prompt"]) for key in ("img_0", "img_1")]
    expected, metrics = preference_kl(*rewards, batch["label"])
    torch.testing.assert_close(loss / 5, expected, atol=1e-5, rtol=0)
    found = model.metrics(totals)
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert found["acc"] == pytest.approx(metrics["accuracy"].item())
    difference = (rewards[0] - rewards[1])[[0, 1, 3, 4]] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    both = torch.cat(rewards)
    assert found["margin"] == pytest.approx(difference.mean().item(), abs=1e-4)
    assert found["reward_mean"] == pytest.approx(both.mean().item(), abs=1e-4)
    assert found["reward_std"] == pytest.approx(both.std(correction=0).item(), abs=1e-3)
    assert found["logit_scale"] == pytest.approx(math.exp(4.6052), rel=1e-6)
    assert (found["pairs"], found["skipped"]) == (5, 0)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_sums_over_micro_batches_are_the_batchs(training: bool) -> None:
    model, batch = tiny_model().train(training), pair_batch(weight=torch.tensor([1.0, 0.5, 1.0, 0.0, 0.25]))
    whole, totals = model(batch)
    parts = [model(rows_of(batch, rows)) for rows in (slice(0, 2), slice(2, 3), slice(3, 5))]
    assert sum(float(part[0].detach()) for part in parts) == pytest.approx(whole.item(), rel=1e-5)
    for key, value in totals.items():
        assert sum(part[1][key] for part in parts) == pytest.approx(value, rel=1e-5, abs=1e-5)
    weights = [model.weight(rows_of(batch, rows)) for rows in (slice(0, 3), slice(3, 5))]
    assert (model.weight(batch), sum(weights), totals["weight"]) == (2.75, 2.75, 2.75)
    assert totals["pairs"] == 4


@pytest.mark.parametrize("contrast", [1.0, 0.3, 0.0])
def test_rows_of_weight_zero_count_nowhere(contrast: float) -> None:
    model, batch = tiny_model(in_batch_negatives=contrast), pair_batch()
    loss, totals = model(rows_of(batch, slice(0, 3)))
    gradient = torch.autograd.grad(loss, model.model.backbone.model.visual_projection.weight)[0]
    padded, same = model(batch | {"weight": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])})
    torch.testing.assert_close(padded, loss, atol=1e-4, rtol=1e-5)
    other = torch.autograd.grad(padded, model.model.backbone.model.visual_projection.weight)[0]
    torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-4)
    assert same == pytest.approx(totals, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("contrast", [1.0, 0.3, 0.0])
def test_a_batch_in_which_nothing_counts(contrast: float) -> None:
    model = tiny_model(in_batch_negatives=contrast)
    loss, totals = model(pair_batch(weight=torch.zeros(5), skipped=torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])))
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
    metrics = model.metrics(totals)
    assert tuple(metrics) == model.metric_names
    assert all(math.isnan(metrics[name]) for name in ("loss", "acc", "margin", "reward_mean", "reward_std"))
    assert (metrics["pairs"], metrics["skipped"]) == (0, 2)


def test_negatives_are_for_training_only() -> None:
    model, batch = tiny_model(in_batch_negatives=1.0), pair_batch()
    contrast, _ = model(batch)
    backbone = model.model.backbone
    images = [backbone.encode_pixels(model.preprocess(batch[key], PROMPTS)[0]) for key in ("img_0", "img_1")]
    expected = pickscore_criterion(
        backbone.encode_tokens(model.preprocess(batch["img_0"], PROMPTS)[1]),
        *images,
        LABELS,
        logit_scale=model.model.scale,
        in_batch_negatives=True,
    )
    torch.testing.assert_close(contrast / 5, expected, atol=1e-3, rtol=1e-4)
    model.prepare_for_validation_step()
    plain = tiny_model()
    torch.testing.assert_close(model(batch)[0], plain(batch)[0])
    model.prepare_for_training_step()
    torch.testing.assert_close(model(batch)[0], contrast)
    model.in_batch_negatives = 0.25
    torch.testing.assert_close(model(batch)[0], 0.25 * contrast + 0.75 * plain(batch)[0])


def test_autocast_spares_the_logits() -> None:
    model, batch = tiny_model(in_batch_negatives=1.0), pair_batch()
    exact = model(batch)[0].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.2)
    loss.backward()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CLIPRewardModel, Path]:
    """Return a model after a step of training, and where it was saved."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(pair_batch())[0].backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    return model.eval(), tmp_path / "saved"


def test_the_reward_loads_and_scores_what_was_trained(saved: tuple[CLIPRewardModel, Path]) -> None:
    model, folder = saved
    images = levels(3).float()
    with torch.no_grad():
        expected = model.get_reward(images, PROMPTS[:3])
    reward = build_reward("PickScore", device="cpu", model_name_or_path=str(folder), divisor=1.0)
    scores = reward(prompt=PROMPTS[:3], image=images.permute(0, 3, 1, 2) / 255).rewards
    torch.testing.assert_close(torch.as_tensor(scores), expected, atol=2e-4, rtol=0)
    assert expected.std() > 1
    scorer = ClipScorer.from_pretrained(folder, kind="pickscore")
    torch.testing.assert_close(scorer.score(images.permute(0, 3, 1, 2) / 255, PROMPTS[:3]), expected, atol=2e-4, rtol=0)


def test_transformers_loads_what_was_trained(saved: tuple[CLIPRewardModel, Path]) -> None:
    model, folder = saved
    assert (folder / "model.safetensors").is_file()
    network, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS[:3], padding=True, truncation=True, return_tensors="pt")
    images = levels(3, height=32, width=32)  # needs no resizing, which this processor does to rounded bytes
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(images.numpy()), return_tensors="pt")
    with torch.no_grad():
        output = network(**tokens, **pixels)
        expected = model.get_reward(images, PROMPTS[:3])
    torch.testing.assert_close(output.logits_per_image.diagonal(), expected, atol=2e-4, rtol=0)


def test_get_reward_model_loads_it_frozen(saved: tuple[CLIPRewardModel, Path]) -> None:
    model, folder = saved
    loaded = get_reward_model({"pretrained": str(folder)}, mbs=2, gbs=4)
    images = levels(5).float().requires_grad_()
    rewards = loaded.get_reward(images, PROMPTS)
    with torch.no_grad():
        torch.testing.assert_close(rewards.detach(), model.get_reward(images, PROMPTS), atol=1e-5, rtol=0)
    rewards.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    half = get_reward_model({"pretrained": str(folder), "precision": "bf16"}, mbs=5, gbs=5)
    with torch.no_grad():
        rough = half.get_reward(images, PROMPTS)
    assert (half.model.backbone.dtype, half.model.logit_scale.dtype, rough.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(rough, rewards.detach(), atol=0.05 * 100, rtol=0)


def test_get_reward_model_checks_its_arguments(saved: tuple[CLIPRewardModel, Path]) -> None:
    _, folder = saved
    with pytest.raises(GeometryError, match="gbs=5 must be a positive multiple of 2"):
        get_reward_model({"pretrained": str(folder)}, mbs=2, gbs=5)
    with pytest.raises(GeometryError, match="mbs=0"):
        get_reward_model({"pretrained": str(folder)}, mbs=0, gbs=4)
    with pytest.raises(RewardError, match=r"there is no model at .*nowhere"):
        get_reward_model({"pretrained": str(folder / "nowhere")}, mbs=1, gbs=1)


def test_a_shared_backbone_is_not_what_is_trained(saved: tuple[CLIPRewardModel, Path]) -> None:
    _, folder = saved
    scorer = ClipScorer.from_pretrained(folder, kind="pickscore")
    model = build_model(ImageTextModelConfig(pretrained=str(folder)), [], seed=0)
    assert model.model.backbone is not scorer.backbone
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(weight.requires_grad for weight in scorer.parameters())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pretrained": "x", "from_scratch": {}},
        {"from_scratch": {}, "tokenizer": "x"},
        {"from_scratch": {"patch_size": 7}},
        {"from_scratch": {"heads": 3}},
    ],
)
def test_impossible_models_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give either|leave it out|must divide"):
        ImageTextModelConfig.model_validate(values)


# --- processes --------------------------------------------------------------------------------------------------------

PROGRAM = """
import json
import torch
from tests.reward_training.pairs import pair_batch, rows_of, tiny_model
from tiltflow.runtime.distributed import Distributed

group = Distributed()
model = tiny_model(in_batch_negatives=1.0)
batch = pair_batch(weight=torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0]))
mine = slice(None) if group.world_size == 1 else (slice(0, 2), slice(2, 5))[group.rank]
share = rows_of(batch, mine)
loss, totals = model(share)
loss.backward()
group.sum_gradients(list(model.parameters()))
sums = group.sum(torch.tensor([loss.item(), model.weight(share), *totals.values()], dtype=torch.float64))
norms = [weight.grad.double().norm().item() for weight in model.parameters()]
if group.is_main:
    print(json.dumps([sums.tolist(), norms]))
group.close()
"""


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    found = []
    for extra in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        done = launch([sys.executable, *extra, str(program)])
        found.append(json.loads(done.stdout))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-4)


def test_the_backbone_of_a_scorer_is_used(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    towers = PickscoreRewardModel(backbone)
    assert towers.backbone is backbone
    torch.testing.assert_close(towers.scale, backbone.logit_scale)
