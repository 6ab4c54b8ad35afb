"""ClipScorer and its backbone: formulas, golden numbers, gradients, what is remembered and what is not."""

import copy
import gc
import pickle
import threading
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig

from tests.scorers.test_open_clip import golden_clip
from tests.scorers.tiny_clip import WIDTH, images, tiny_backbone, tiny_model, tiny_tokenizer
from tests.shared import golden, requires_shared
from tiltflow.errors import RewardError
from tiltflow.scorers import ClipScorer, clip_preprocess, hps_preprocess
from tiltflow.scorers.clip_backbone import ClipBackbone, Preprocess
from tiltflow.scorers.open_clip import load_open_clip

PROMPTS = ["cat", "a red dog", "dog cat dog", ""]
CROP = Preprocess()


class Calls:
    """Counts the images and the prompts that a backbone's network reads."""

    def __init__(self, backbone: ClipBackbone):
        self.images: list[int] = []
        self.prompts: list[int] = []
        backbone.model.vision_model.register_forward_hook(
            lambda module, args, kwargs, output: self.images.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        backbone.model.text_model.register_forward_hook(
            lambda module, args, kwargs, output: self.prompts.append(len(kwargs["input_ids"])), with_kwargs=True
        )


def reference(backbone: ClipBackbone, pixels: Tensor, prompts: list[str]) -> Any:
    """Return what transformers' own forward pass makes of the same input."""
    tokens = backbone.tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return backbone.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        )


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_pickscore_is_the_diagonal_of_the_logits() -> None:
    backbone, batch = tiny_backbone(), images(4)
    output = reference(backbone, clip_preprocess(batch, size=32), PROMPTS)
    scores = ClipScorer(backbone, kind="pickscore").score(batch, PROMPTS)
    torch.testing.assert_close(scores, output.logits_per_image.diagonal(), atol=1e-4, rtol=0)
    assert scores.dtype == torch.float32
    assert scores.std() > 1


def test_clipscore_is_the_cosine_or_the_logit() -> None:
    backbone, batch = tiny_backbone(), images(4)
    output = reference(backbone, clip_preprocess(batch, size=32), PROMPTS)
    cosine = ClipScorer(backbone, kind="clip").score(batch, PROMPTS)
    logits = ClipScorer(backbone, kind="clip", scale="logits").score(batch, PROMPTS)
    torch.testing.assert_close(cosine, (output.image_embeds * output.text_embeds).sum(dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, output.logits_per_image.diagonal(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_hpsv2_is_the_cosine_of_the_padded_image(antialias: bool) -> None:
    backbone, batch = tiny_backbone(), images(4)
    output = reference(backbone, hps_preprocess(batch, size=32, antialias=antialias), PROMPTS)
    scores = ClipScorer(backbone, kind="hpsv2", antialias=antialias).score(batch, PROMPTS)
    torch.testing.assert_close(scores, (output.image_embeds * output.text_embeds).sum(dim=-1), atol=1e-6, rtol=0)


def test_the_kinds_differ() -> None:
    backbone, batch = tiny_backbone(), images(4)
    scorers = [ClipScorer(backbone, kind="clip"), ClipScorer(backbone, kind="hpsv2")]
    scorers.append(ClipScorer(backbone, kind="hpsv2", antialias=False))
    a, b, c = (scorer.score(batch, PROMPTS) for scorer in scorers)
    assert min((a - b).abs().max(), (b - c).abs().max()) > 1e-3


def test_only_hpsv2_has_a_variant_without_antialiasing() -> None:
    with pytest.raises(RewardError, match="antialias=False: only HPSv2's preprocessing has this variant"):
        ClipScorer(tiny_backbone(), kind="clip", antialias=False)


# --- golden numbers ---------------------------------------------------------------------------------------------------


class Tokens:
    """A tokenizer that knows the token ids of the golden prompts, which are their row numbers."""

    eos_token_id = 511

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return 512

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([self.rows[int(text)] for text in texts])}


def golden_backbone(activation: Any) -> tuple[ClipBackbone, dict[str, Tensor]]:
    state, tensors = golden_clip()
    model = load_open_clip(state, hidden_act=activation, vision_head_width=16, text_head_width=16)
    tokenizer: Any = Tokens(tensors["in/token_ids"])
    return ClipBackbone(model, tokenizer), tensors


@requires_shared
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_golden_features(activation: str) -> None:
    backbone, tensors = golden_backbone(activation)
    expected = {name.rpartition("/")[2]: t for name, t in tensors.items() if name.startswith(f"out/{activation}/")}
    image = backbone.encode_pixels(tensors["in/pixels"])
    text = backbone.text_features(["0", "1", "2", "3"])
    torch.testing.assert_close(image, expected["image_features"], atol=3e-6, rtol=0)
    torch.testing.assert_close(text, expected["text_features"], atol=3e-6, rtol=0)
    torch.testing.assert_close((image * text).sum(dim=-1), expected["hps_score"], atol=3e-6, rtol=0)
    torch.testing.assert_close(backbone.logit_scale.view(1), expected["logit_scale_exp"], atol=1e-6, rtol=1e-6)


@requires_shared
@pytest.mark.parametrize("variant", ["antialias_on", "antialias_off"])
def test_golden_hpsv2_from_bytes_to_score(variant: str) -> None:
    backbone, _ = golden_backbone("gelu")
    meta, tensors = golden("scorers/hps_preprocess")
    batch = [tensors[f"img{i}/u8"].permute(2, 0, 1) / 255 for i in tensors["end_to_end/image_index"].tolist()]
    prompts = [str(row) for row in tensors["end_to_end/token_row"].tolist()]
    scores = ClipScorer(backbone, kind="hpsv2", antialias=variant == "antialias_on").score(batch, prompts)
    expected = tensors[f"end_to_end/hps_score_{variant}"]
    tolerance = meta["tolerance"]["end_to_end_score_abs"]
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


# --- what every scorer promises ---------------------------------------------------------------------------------------


def scorers() -> list[ClipScorer]:
    backbone = tiny_backbone()
    return [ClipScorer(backbone, kind=kind) for kind in ("clip", "pickscore", "hpsv2")]


@pytest.mark.parametrize("kind", ["clip", "pickscore", "hpsv2"])
def test_a_gradient_reaches_every_pixel_that_is_seen_and_no_weight(kind: Any) -> None:
    backbone = tiny_backbone()
    batch = images(2, height=32, width=32).requires_grad_()
    scores = ClipScorer(backbone, kind=kind).score(batch, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), batch)
    assert (gradient != 0).all()
    assert ClipScorer.differentiable
    assert not any(weight.requires_grad for weight in backbone.parameters())


def test_the_gradient_is_that_of_the_score() -> None:
    scorer = ClipScorer(tiny_backbone(), kind="clip").double()
    pixels = images(1, height=32, width=32)
    batch = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(batch, ["cat"]).sum(), batch)
    direction = torch.randn_like(pixels) * 1e-2
    with torch.no_grad():
        change = scorer.score(pixels + direction, ["cat"]) - scorer.score(pixels - direction, ["cat"])
    assert (gradient * direction).sum().item() == pytest.approx(change.item() / 2, rel=0.02)


@pytest.mark.parametrize("kind", ["clip", "pickscore", "hpsv2"])
def test_scores_depend_on_neither_batch_nor_order(kind: Any) -> None:
    batch = images(4)
    scores = ClipScorer(tiny_backbone(), kind=kind).score(batch, PROMPTS)
    alone = [ClipScorer(tiny_backbone(), kind=kind).score(batch[i : i + 1], [PROMPTS[i]]) for i in range(4)]
    order = [2, 0, 3, 1]
    mixed = ClipScorer(tiny_backbone(), kind=kind).score(batch[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(torch.cat(alone), scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed, scores[order], atol=1e-4, rtol=0)


def test_images_of_several_sizes() -> None:
    scorer = ClipScorer(tiny_backbone(), kind="clip")
    batch = [images(1)[0], images(1, height=64, width=33)[0], images(1, height=32, width=32)[0]]
    scores = scorer.score(batch, PROMPTS[:3])
    alone = torch.cat([scorer.score([image.clone()], [text]) for image, text in zip(batch, PROMPTS, strict=False)])
    torch.testing.assert_close(scores, alone, atol=1e-6, rtol=0)


def test_a_pil_image_and_its_tensor_mean_the_same_pixels() -> None:
    levels = (images(1) * 255).round().to(torch.uint8)[0]
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    again = torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(40, 48, 3).permute(2, 0, 1) / 255
    scorer = ClipScorer(tiny_backbone(), kind="pickscore")
    assert torch.equal(scorer.score([levels / 255], ["cat"]), scorer.score([again], ["cat"]))


def test_a_long_prompt_is_cut_off_and_keeps_its_end() -> None:
    backbone = tiny_backbone()
    long = " ".join("abcdefghijklmnop")
    features = backbone.text_features([long, long + " q r s"])
    assert torch.equal(features[0], features[1])
    assert (features[0] - backbone.text_features([long[:9]])[0]).abs().max() > 1e-3


def test_nothing_gives_nothing() -> None:
    for scorer in scorers():
        assert scorer.score([], []).shape == (0,)
        assert scorer.score(torch.zeros(0, 3, 8, 8), []).shape == (0,)


def test_every_image_needs_its_prompt() -> None:
    with pytest.raises(RewardError, match="3 images with 2 prompts: give every image its own prompt"):
        scorers()[0].score(images(3), ["a", "b"])


def test_bytes_are_refused() -> None:
    with pytest.raises(RewardError, match=r"the images are torch.uint8; pass floats in \[0, 1\]"):
        scorers()[0].score((images(2) * 255).to(torch.uint8), ["a", "b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = ClipScorer(tiny_backbone(), kind="clip").score(images(4), PROMPTS)
    scorer = ClipScorer(tiny_backbone().to(dtype), kind="clip")
    scores = scorer.score(images(4), PROMPTS)
    assert scorer.dtype == dtype
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))])
def test_a_copy_scores_the_same_with_a_memory_of_its_own(duplicate: Any) -> None:
    scorer, batch = ClipScorer(tiny_backbone(), kind="pickscore"), images(2)
    scores = scorer.score(batch, PROMPTS[:2])
    other = duplicate(scorer)
    calls = Calls(other.backbone)
    assert torch.equal(other.score(batch, PROMPTS[:2]), scores)
    assert (calls.images, calls.prompts) == ([2], [2])


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_two_scorers_over_one_backbone_encode_each_image_once() -> None:
    backbone, batch = tiny_backbone(), images(4)
    calls = Calls(backbone)
    pick, clip, hps = (ClipScorer(backbone, kind=kind) for kind in ("pickscore", "clip", "hpsv2"))
    a = pick.score([batch[i] for i in range(4)], PROMPTS)  # rows taken anew, as every reward is given them
    b = clip.score([batch[i] for i in range(4)], PROMPTS)
    assert (calls.images, calls.prompts) == ([4], [4])
    torch.testing.assert_close(a, b * backbone.logit_scale)
    hps.score(batch, PROMPTS)
    assert (calls.images, calls.prompts) == ([4, 4], [4])  # padded images are other images


def test_only_the_new_images_of_a_batch_are_encoded() -> None:
    backbone, batch = tiny_backbone(), images(4)
    calls = Calls(backbone)
    first = backbone.image_features(batch[1:3], CROP)
    features = backbone.image_features(batch, CROP)
    assert calls.images == [2, 2]
    assert torch.equal(features[1:3], first)
    backbone.forget()
    torch.testing.assert_close(backbone.image_features(batch, CROP), features, atol=1e-6, rtol=0)


def test_an_image_that_was_written_to_is_encoded_again() -> None:
    backbone, batch = tiny_backbone(), images(2)
    calls = Calls(backbone)
    before = backbone.image_features(batch, CROP)
    batch[0].fill_(0.5)
    after = backbone.image_features(batch, CROP)
    assert calls.images == [2, 2]
    assert not torch.equal(before[0], after[0])


def test_an_image_is_forgotten_when_its_tensor_is_gone() -> None:
    backbone, batch = tiny_backbone(), images(2)
    row = batch[1]
    backbone.image_features(batch, CROP)
    assert len(backbone._images) == 2
    del batch
    gc.collect()
    assert len(backbone._images) == 2  # the row keeps them alive
    del row
    gc.collect()
    assert len(backbone._images) == 0


def test_nothing_is_remembered_where_a_gradient_is_wanted() -> None:
    backbone, batch = tiny_backbone(), images(2)
    calls = Calls(backbone)
    backbone.image_features(batch, CROP)
    batch.requires_grad_()
    for _ in range(2):
        assert backbone.image_features(batch, CROP).requires_grad
    assert calls.images == [2, 2, 2]
    with torch.no_grad():
        assert not backbone.image_features(batch, CROP).requires_grad


@pytest.mark.parametrize("images_are_trained_on", [True, False])
def test_a_trainable_network_is_never_remembered_with_gradients(images_are_trained_on: bool) -> None:
    backbone, batch = tiny_backbone(), images(2).requires_grad_(images_are_trained_on)
    with torch.no_grad():
        stale = backbone.text_features(["cat"])
    backbone.requires_grad_()
    text, image = backbone.text_features(["cat"]), backbone.image_features(batch, CROP)
    assert text.requires_grad
    assert image.requires_grad
    (text.sum() + image.sum()).backward()
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.grad is not None:
                weight.sub_(0.1 * weight.grad)
        assert not torch.equal(backbone.text_features(["cat"]), stale)


def test_changed_weights_forget_everything() -> None:
    backbone, batch = tiny_backbone(), images(2)
    before = backbone.image_features(batch, CROP), backbone.text_features(["cat"])
    backbone.model.load_state_dict(tiny_model(seed=2).state_dict())
    after = backbone.image_features(batch, CROP), backbone.text_features(["cat"])
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_training_mode_and_autocast_remember_nothing() -> None:
    backbone, batch = tiny_backbone(), images(2)
    calls = Calls(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone.image_features(batch, CROP)
    backbone.train()
    backbone.image_features(batch, CROP)
    backbone.eval()
    backbone.image_features(batch, CROP)
    assert calls.images == [2, 2, 2]
    assert len(backbone._images) == 2


def test_inference_mode_leaves_nothing_behind_that_cannot_be_differentiated() -> None:
    backbone, batch = tiny_backbone(), images(2)
    scorer = ClipScorer(backbone, kind="clip")
    with torch.inference_mode():
        scorer.score(batch, PROMPTS[:2])
        scorer.score(images(2), PROMPTS[:2])  # made in inference mode: such images are not remembered
    assert len(backbone._images) == 2
    scores = scorer.score(batch.clone().requires_grad_(), PROMPTS[:2])
    scores.sum().backward()
    assert not scorer.score(batch, PROMPTS[:2]).is_inference()


def test_prompts_are_encoded_once_and_the_oldest_forgotten() -> None:
    backbone = ClipBackbone(tiny_model(), tiny_tokenizer(), remembered_prompts=2)
    calls = Calls(backbone)
    first = backbone.text_features(["cat", "dog", "cat"])
    assert calls.prompts == [2]
    assert torch.equal(first[0], first[2])
    backbone.text_features(["red"])  # "cat" goes
    backbone.text_features(["dog"])
    backbone.text_features(["cat"])
    assert calls.prompts == [2, 1, 1]
    many = backbone.text_features(["a", "b", "c", "d"])  # more than there is room for
    assert len(backbone._texts) == 2
    torch.testing.assert_close(backbone.text_features(["a"])[0], many[0], atol=1e-6, rtol=0)


def test_rewards_in_several_threads_share_one_pass() -> None:
    backbone, batch = tiny_backbone(), images(4)
    calls = Calls(backbone)
    start = threading.Barrier(4, timeout=20)
    results: dict[int, Tensor] = {}

    def run(number: int) -> None:
        scorer = ClipScorer(backbone, kind="pickscore" if number % 2 else "clip", scale="cosine")
        start.wait()
        results[number] = scorer.score([batch[i] for i in range(4)], PROMPTS)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [0, 1, 2, 3]
    assert (calls.images, calls.prompts) == ([4], [4])
    assert all(torch.equal(results[number], results[0]) for number in range(4))


# --- tokenizers that are not the network's ----------------------------------------------------------------------------


def model_with(**text: int) -> CLIPModel:
    model = tiny_model()
    config = model.config
    assert isinstance(config.text_config, CLIPTextConfig)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    model.text_model.eos_token_id = config.text_config.eos_token_id
    return model


def test_a_tokenizer_with_another_end_is_refused() -> None:
    with pytest.raises(RewardError, match="ends texts with token 59, the network pools at token 7; use the network's"):
        ClipBackbone(model_with(eos_token_id=7), tiny_tokenizer())


def test_a_tokenizer_with_more_tokens_is_refused() -> None:
    with pytest.raises(RewardError, match="the tokenizer has 60 tokens, the network 50; use the network's tokenizer"):
        ClipBackbone(model_with(vocab_size=50), tiny_tokenizer())


def test_old_configs_pool_at_the_largest_token() -> None:
    legacy, modern = ClipBackbone(model_with(eos_token_id=2), tiny_tokenizer()), tiny_backbone()
    assert torch.equal(legacy.text_features(PROMPTS), modern.text_features(PROMPTS))
    assert legacy.width == WIDTH
