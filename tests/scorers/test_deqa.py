"""The five-word score on small random models of real classes: against the whole logits, and what must be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.scorers.tiny_vlm import TEMPLATE, save_vlm
from tiltflow.errors import RewardError
from tiltflow.scorers.deqa import ANSWER, LEVELS, QUESTION, DeQAScorer, expected_level, pad_to_square, to_pil


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = np.random.default_rng(4)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("llava_next"), "llava_next")


def test_the_mean_of_five_levels() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0], [0.2, 0.2, 0.2, 0.2, 0.2], [0.5, 0, 0.5, 0, 0]])
    assert expected_level(rows).tolist() == pytest.approx([5.0, 1.0, 3.0, 4.0])


def test_the_score_is_the_softmax_of_the_five_words_after_the_prompt(llava: Path) -> None:
    scorer = DeQAScorer.from_folder(llava)
    assert scorer.prompt == f"USER: <image> {QUESTION} ASSISTANT: {ANSWER}"
    image = pictures((28, 28))[0]
    inputs = scorer.processor(text=[scorer.prompt], images=[image], return_tensors="pt")
    words = [scorer.processor.tokenizer.convert_tokens_to_ids(word) for word in LEVELS]
    logits = scorer.model(**inputs).logits[0, -1, words]
    expected = torch.softmax(logits, 0)
    assert expected.max() - expected.min() > 0.05
    torch.testing.assert_close(scorer.rate([image])[0], expected)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    score = scorer.score([tensor], [""])
    assert score.dtype == torch.float32
    mean = 5 * expected[0] + 4 * expected[1] + 3 * expected[2] + 2 * expected[3] + expected[4]
    torch.testing.assert_close(score[0], mean)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_an_image_is_rated_alike_alone_and_among_others(kind: str, request: pytest.FixtureRequest) -> None:
    scorer = DeQAScorer.from_folder(request.getfixturevalue(kind))
    images = pictures((28, 28), (56, 56), (40, 30), (20, 64))
    together = scorer.rate(images)
    assert together.shape == (4, 5)
    torch.testing.assert_close(together.sum(1), torch.ones(4))
    torch.testing.assert_close(together, torch.cat([scorer.rate([image]) for image in images]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together, scorer.rate(images[::-1]).flip(0), atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_images_of_different_lengths_are_padded(llava_next: Path) -> None:
    """What the test above relies on: the shorter row of this model ends before the last position."""
    scorer = DeQAScorer.from_folder(llava_next)
    lengths = scorer._inputs(pictures((28, 28), (56, 56)))["attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1]


def test_no_images(llava: Path) -> None:
    assert DeQAScorer.from_folder(llava).score(torch.rand(0, 3, 4, 4), []).shape == (0,)


def test_other_shapes_are_padded_to_a_square_with_the_mean_colour(llava: Path) -> None:
    scorer = DeQAScorer.from_folder(llava)
    assert scorer.background == (122, 116, 104)
    wide = pictures((40, 30))[0]
    square = pad_to_square(wide, scorer.background)
    assert square.size == (40, 40)
    assert square.getpixel((0, 4)) == square.getpixel((39, 35)) == (122, 116, 104)
    assert square.crop((0, 5, 40, 35)).tobytes() == wide.tobytes()
    tall = pad_to_square(wide.transpose(Image.Transpose.ROTATE_90), (1, 2, 3))
    assert (tall.size, tall.getpixel((4, 39)), tall.getpixel((35, 0))) == ((40, 40), (1, 2, 3), (1, 2, 3))
    assert pad_to_square(square, (0, 0, 0)) is square
    torch.testing.assert_close(scorer.rate([wide]), scorer.rate([square]))


def test_pixels_are_rounded_to_eight_bits() -> None:
    image = torch.tensor([0.0, 0.5, 1.2]).view(3, 1, 1)
    assert to_pil(image).getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(value: float) -> None:
    image = torch.rand(3, 4, 4)
    image[1, 2, 3] = value
    with pytest.raises(RewardError, match="an image has NaN or infinite values"):
        to_pil(image)


def test_half_precision(llava: Path) -> None:
    images = pictures((28, 28), (56, 56))
    half = DeQAScorer.from_folder(llava, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    rated = half.rate(images)
    assert rated.dtype == torch.float32
    torch.testing.assert_close(rated, DeQAScorer.from_folder(llava).rate(images), atol=0.05, rtol=0)


def test_a_prompt_instead_of_a_chat_template(tmp_path: Path, llava: Path) -> None:
    bare = save_vlm(tmp_path, template=None)
    with pytest.raises(RewardError, match="has no chat template; give prompt=, the whole text before the quality word"):
        DeQAScorer.from_folder(bare)
    prompt = f"USER: <image> {QUESTION} ASSISTANT: {ANSWER}"
    images = pictures((28, 28))
    torch.testing.assert_close(
        DeQAScorer.from_folder(bare, prompt=prompt).rate(images), DeQAScorer.from_folder(llava).rate(images)
    )


def test_a_template_that_begins_the_text_itself_gets_no_second_beginning(tmp_path: Path) -> None:
    scorer = DeQAScorer.from_folder(save_vlm(tmp_path, template="<s> " + TEMPLATE))
    tokens = scorer._inputs(pictures((28, 28)))["input_ids"][0].tolist()
    assert tokens.count(scorer.processor.tokenizer.bos_token_id) == 1


def test_words_that_are_no_token(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="tokenizer has no single token for 'bad'"):
        DeQAScorer.from_folder(save_vlm(tmp_path, levels=LEVELS[:-1]))


def test_a_model_with_its_own_code_is_refused(tmp_path: Path, llava: Path) -> None:
    """As the published DeQA-Score-Mix3 has it: an unknown type, and files of code named in `auto_map`."""
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llava / "config.json").read_text())
    config |= {
        "model_type": "mplug_owl2",
        "auto_map": {
            "AutoConfig": "configuration.Config",
            "AutoModelForImageTextToText": "modeling.Model",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("configuration", "modeling"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(RewardError, match=r"mPLUG-Owl2.*is never run"):
        DeQAScorer.from_folder(tmp_path)


def test_unexpected_weights_are_refused(tmp_path: Path, llava: Path) -> None:
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    extra = {**weights, "model.spare.weight": torch.zeros(2)}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"1 are missing, misshapen or unexpected, the first being model\.spare"):
        DeQAScorer.from_folder(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path, llava: Path) -> None:
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    save_file(
        {k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(RewardError, match="do not fit LlavaForConditionalGeneration: 1 are missing, misshapen or"):
        DeQAScorer.from_folder(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no vision-language model can be loaded from"):
        DeQAScorer.from_folder(tmp_path)
