"""ImageReward against numbers of its released code; strict weights, gradients, independent rows."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.scorers.tiny_image_reward import random_state, write_models
from tests.shared import SHARED, golden, requires_shared
from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.scorers.image_reward import (
    TEXT_HEADS,
    VISION_HEADS,
    WEIGHTS,
    ImageRewardScorer,
    image_reward_tokenizer,
)
from tiltflow.scorers.image_reward_weights import IGNORED, convert_image_reward, image_reward_sizes

PROMPTS = ["w5 w7 w200", "w6", "w300 w301 unknown [ENC]"]


def build(path: Path | None = None, *, dtype: torch.dtype = torch.float32) -> ImageRewardScorer:
    """Load a small network, from the models folder unless told otherwise."""
    path = path or WEIGHTS.require()
    return ImageRewardScorer.from_checkpoint(path, image_reward_tokenizer(), vision_heads=4, text_heads=4, dtype=dtype)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with a small random ImageReward, which is where weights are looked for."""
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    return write_models(tmp_path, random_state())


@pytest.fixture
def scorer(models: Path) -> ImageRewardScorer:
    return build()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 48, 40)


def golden_scorer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageRewardScorer, dict[str, Tensor]]:
    _, tensors = golden("scorers/imagereward_tiny")
    state = {key.removeprefix("state_dict/"): value for key, value in tensors.items() if key.startswith("state_dict/")}
    assert len(state) == 101
    monkeypatch.setenv(MODELS_VARIABLE, str(write_models(folder, state)))
    return build(), tensors


@requires_shared
def test_golden_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, tensors = golden_scorer(tmp_path, monkeypatch)
    tokens, mask = tensors["in/input_ids"], tensors["in/attention_mask"]
    image = scorer.look(tensors["in/pixels"])
    assert image.shape == (4, 197, 64)
    torch.testing.assert_close(image[:, :4], tensors["out/image_tokens_first4"], atol=2e-5, rtol=0)
    state = scorer.read(tokens, mask, image)
    torch.testing.assert_close(state, tensors["out/text_cls"], atol=2e-5, rtol=0)
    torch.testing.assert_close(scorer.head(state).squeeze(1), tensors["out/mlp_raw"], atol=2e-5, rtol=0)
    reward = scorer(tensors["in/pixels"], tokens, mask)
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward, tensors["out/reward"], atol=2e-5, rtol=0)


@requires_shared
def test_golden_of_every_prompt_with_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, tensors = golden_scorer(tmp_path, monkeypatch)
    prompt, image = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    rewards = scorer(tensors["in/pixels"][image], tensors["in/input_ids"][prompt], tensors["in/attention_mask"][prompt])
    torch.testing.assert_close(rewards.view(4, 4), tensors["out/reward_matrix_prompt_by_image"], atol=2e-5, rtol=0)


@requires_shared
def test_golden_from_images_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, tensors = golden_scorer(tmp_path, monkeypatch)
    prompts = [" ".join(f"W{token}" for token in row if token not in (0, 101, 102)) for row in tensors["in/input_ids"]]
    tokens, mask = scorer.tokenize(prompts)
    assert torch.equal(tokens, tensors["in/input_ids"])
    assert torch.equal(mask, tensors["in/attention_mask"])
    images = tensors["in/images_u8"].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(scorer.score(images, prompts), tensors["out/reward"], atol=2e-5, rtol=0)


@requires_shared
def test_the_published_layout_is_converted_completely() -> None:
    keys = json.loads((SHARED / "data/manifests/imagereward_v1.json").read_text())["keys"]
    state = {name: torch.empty(shape, device="meta") for name, (shape, _) in keys.items()}
    converted = convert_image_reward(state)
    assert len(converted) == len(state) - len(IGNORED) == 620
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    sizes = image_reward_sizes(shapes, vision_heads=VISION_HEADS, text_heads=TEXT_HEADS)
    assert (sizes.image_size, sizes.vision_layers, sizes.text_layers) == (224, 24, 12)
    with torch.device("meta"):
        network = ImageRewardScorer(sizes, FullVocabulary())  # pyright: ignore[reportArgumentType]
    own = {name: value.shape for name, value in network.state_dict().items()}
    assert own == {name: value.shape for name, value in converted.items()}


class FullVocabulary:
    """Stands for a tokenizer of the published size, of which only the size is asked."""

    def __len__(self) -> int:
        return 30524


def test_a_score_depends_on_its_own_image_and_prompt_only(scorer: ImageRewardScorer, images: Tensor) -> None:
    together = scorer.score(images, PROMPTS)
    alone = torch.cat([scorer.score(images[row : row + 1], PROMPTS[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.score(images.flip(0), PROMPTS[::-1]).flip(0), together, atol=1e-5, rtol=0)
    assert together.unique().numel() == 3
    moved = scorer.score(images, [PROMPTS[1], *PROMPTS[1:]])
    assert (moved - together).abs()[0] > 1e-3
    torch.testing.assert_close(moved[1:], together[1:])


def test_images_of_any_sizes(scorer: ImageRewardScorer, images: Tensor) -> None:
    others = [torch.rand(3, 32, 32), images[1], torch.rand(3, 33, 90)]
    scores = scorer.score(others, PROMPTS)
    torch.testing.assert_close(scores[1:2], scorer.score(images[1:2], PROMPTS[1:2]), atol=1e-5, rtol=0)


def test_the_gradient_reaches_the_pixels_and_not_the_weights(scorer: ImageRewardScorer, images: Tensor) -> None:
    images.requires_grad_(True)
    scorer.score(images, PROMPTS)[1].backward()
    assert images.grad is not None
    assert images.grad[1].abs().sum() > 0
    assert images.grad[[0, 2]].abs().sum() == 0
    assert not scorer.training
    assert all(parameter.grad is None for parameter in scorer.parameters())

    direction = torch.randn_like(images[1])
    slope = (images.grad[1] * direction).sum().double()
    step = 1e-3
    ends = [scorer.score(images.detach()[1:2] + sign * step * direction, PROMPTS[1:2]) for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(slope.item(), rel=0.02)


def test_long_prompts_are_cut(scorer: ImageRewardScorer) -> None:
    words = " ".join(["w7"] * 50)
    tokens, mask = scorer.tokenize([words, "w7"])
    assert tokens.shape == mask.shape == (2, 35)
    assert tokens[0, -1] == 102
    assert mask.sum(1).tolist() == [35, 3]


def test_no_images_have_no_scores(scorer: ImageRewardScorer) -> None:
    assert scorer.score(torch.rand(0, 3, 8, 8), []).shape == (0,)


def test_prompts_and_images_must_pair(scorer: ImageRewardScorer, images: Tensor) -> None:
    with pytest.raises(RewardError, match="got 1 images and 3 prompts; give one per image"):
        scorer.score(images[:1], PROMPTS)


def test_half_precision_and_pickling(models: Path, scorer: ImageRewardScorer, images: Tensor) -> None:
    exact = scorer.score(images, PROMPTS)
    torch.testing.assert_close(pickle.loads(pickle.dumps(scorer)).score(images, PROMPTS), exact)
    half = build(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    scores = half.score(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() < 0.05 * exact.abs().max()


def load(state: dict[str, Tensor], folder: Path) -> ImageRewardScorer:
    save_file(state, folder / "weights.safetensors")
    return build(folder / "weights.safetensors")


def test_names_that_may_differ(scorer: ImageRewardScorer, images: Tensor, tmp_path: Path) -> None:
    expected = scorer.score(images, PROMPTS)
    without_unused = {name: value for name, value in random_state().items() if name not in IGNORED}
    torch.testing.assert_close(load(without_unused, tmp_path).score(images, PROMPTS), expected)
    distributed = {f"module.{name}": value for name, value in random_state().items()}
    torch.testing.assert_close(load(distributed, tmp_path).score(images, PROMPTS), expected)


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("blip.visual_encoder.norm.bias", {}, "does not fit ImageRewardScorer: missing vision.post_layernorm.bias"),
        ("mlp.layers.4.bias", {}, "missing head.4.bias"),
        (None, {"blip.itm_head.weight": torch.zeros(2, 2)}, "unexpected blip.itm_head.weight"),
        (None, {"mlp.layers.0.bias": torch.zeros(3)}, "head.0.bias is .3. instead of .1024."),
        ("mlp.layers.2.weight", {}, "these are no weights of ImageReward: mlp.layers.2.weight is missing"),
    ],
)
def test_weights_that_do_not_fit(
    models: Path, tmp_path: Path, remove: str | None, add: dict[str, Tensor], message: str
) -> None:
    state = {name: value for name, value in random_state().items() if name != remove}
    with pytest.raises(RewardError, match=message):
        load(state | add, tmp_path)


def test_numbers_of_heads_must_divide(models: Path) -> None:
    with pytest.raises(RewardError, match="text_heads=7 does not divide the text width 96"):
        ImageRewardScorer.from_checkpoint(WEIGHTS.require(), image_reward_tokenizer(), vision_heads=4, text_heads=7)


def test_a_vocabulary_of_another_size(models: Path) -> None:
    with (models / "bert-base-uncased/vocab.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(RewardError, match=r"tokenizer of ImageReward has 401 tokens where its network has 400"):
        build()


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    with pytest.raises(RewardError, match=r"bert-base-uncased/vocab.txt were not found; get them from huggingface.co"):
        image_reward_tokenizer()
    with pytest.raises(RewardError, match=r"weights ImageReward.pt were not found; get them from huggingface.co/THUDM"):
        WEIGHTS.require()
