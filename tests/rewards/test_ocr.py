"""The OCR reward: its arithmetic against the golden cases, and RapidOCR reading drawn words."""

import math
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.samples import entry
from tests.shared import golden, requires_shared
from tiltflow.demo.words import draw_word, word_prompt
from tiltflow.errors import RewardError
from tiltflow.rewards import RewardEngine, build_reward, ocr
from tiltflow.rewards.ocr import Piece, joined_text, ocr_score, quoted_text
from tiltflow.types import Prompt, SampleBatch

WORDS = ("CAT", "UP", "QUIZ", "MOON")


def sign(word: str, seed: int = 0) -> Image.Image:
    return Image.fromarray(draw_word(word, rng=np.random.default_rng(seed)))


def samples(words: tuple[str, ...], images: list[Image.Image]) -> SampleBatch:
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2) / 255
    prompts = [Prompt(word_prompt(word)) for word in words]
    return SampleBatch(prompts, torch.arange(len(words)), torch.zeros(len(words), 1, 1, 1), pixels)


@pytest.fixture(scope="module")
def reward() -> Any:
    return build_reward("OCR", device="cpu", upscale=2)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@requires_shared
def test_golden_cases() -> None:
    """Scores are flow_grpo's, the reference that heeds confidences; where it raises, so does this project.

    The case whose recogniser fails is the next test's: there the reference gives 0, and this project raises.
    """
    meta, tensors = golden("algorithms/ocr_score")
    scores = tensors["flow_grpo_scores"].tolist()
    assert len(scores) == len(meta["cases"]) == 40
    refused = []
    for case, expected in zip(meta["cases"], scores, strict=True):
        if case["recognised"] == "raise":
            continue
        pieces = [Piece(piece["text"], piece["confidence"]) for piece in case["recognised"] or []]
        if math.isnan(expected):
            refused.append(case["tag"])
            with pytest.raises(RewardError):
                ocr_score(case["prompt"], pieces)
        else:
            assert ocr_score(case["prompt"], pieces) == pytest.approx(expected, abs=1e-12), case["tag"]
    assert refused == ["no quotes", "curly quotes only", "single quotes only", "empty target", "blank target"]


@pytest.mark.parametrize("failing_images", [{0}, {1, 2}])
def test_a_recogniser_that_fails_is_a_failure_and_never_a_zero(failing_images: set[int]) -> None:
    """The golden case "recogniser raises", which both references score 0."""
    model = build_reward("OCR", device="cpu", workers=1, batch_size=1)
    recogniser = model._idle.get()  # pyright: ignore[reportAttributeAccessIssue]
    calls = iter(range(3))

    def breaking(pixels: Any, **options: Any) -> Any:
        if next(calls) in failing_images:
            raise OSError("out of memory")
        return recogniser(pixels, **options)

    model._idle.put(breaking)  # pyright: ignore[reportAttributeAccessIssue]
    words = WORDS[:3]
    engine = RewardEngine([entry("ocr", "OCR", on_error="mask", batch_size=1)], factory=lambda arguments: model)
    table = engine.score(samples(words, [sign(word) for word in words]))
    assert [math.isnan(score) for score in table.column("ocr")] == [index in failing_images for index in range(3)]
    assert {failure.kind for failure in table.failures} == {"OSError"}
    assert sum(len(failure.samples) for failure in table.failures) == len(failing_images)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ('"a" and "b"', "a"),
        ('an unclosed "Stop quote', "Stop quote"),
        ("\"It's 5 o'clock\"", "It's 5 o'clock"),
    ],
)
def test_the_target_is_in_the_first_pair_of_double_quotes(prompt: str, target: str) -> None:
    assert quoted_text(prompt) == target


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a plain sign", "prompt='a plain sign' has no ASCII double quotes.*put the text into quotes"),
        ("a “curly” sign", "prompt='a “curly” sign' has no ASCII double quotes"),
        ('an empty "" sign', "prompt='an empty \"\" sign' has no text in its first double quotes"),
        ('a blank "  " sign and "more"', "has no text in its first double quotes; write the wanted text there"),
        ('ends with "', "has no text in its first double quotes"),
    ],
)
def test_a_prompt_without_a_target_is_named(prompt: str, message: str) -> None:
    for call in (lambda: quoted_text(prompt), lambda: ocr_score(prompt, [Piece("plain", 0.9)])):
        with pytest.raises(RewardError, match=message):
            call()


def test_pieces_are_joined_in_order_without_those_of_no_confidence() -> None:
    assert joined_text([Piece("Hello ", 0.9), Piece("cruel", 0.0), Piece("World", 0.1)]) == "Hello World"
    assert joined_text([]) == ""


@pytest.mark.parametrize(
    ("text", "score"), [("CAT", 1), ("a cat!", 1), ("CAR", 2 / 3), ("cart", 2 / 3), ("dog", 0), ("scattered", 1)]
)
def test_a_score_worked_out_by_hand(text: str, score: float) -> None:
    assert ocr_score('a sign that says "C A T"', [Piece(text, 0.9)]) == pytest.approx(score, abs=1e-12)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_it_reads_drawn_words_and_says_what_it_read(reward: Any) -> None:
    output = reward([word_prompt(word) for word in WORDS], image=[sign(word) for word in WORDS])
    assert output.rewards == [1.0] * 4
    assert [text.upper() for text in output.extra_info["recognised"]] == list(WORDS)


def test_another_word_is_worth_the_letters_that_it_shares(reward: Any) -> None:
    output = reward([word_prompt("CAR"), word_prompt("CAT"), word_prompt("DIM")], image=[sign("CAT")] * 3)
    assert output.rewards == pytest.approx([2 / 3, 1, 0], abs=1e-12)


def test_an_image_without_text_scores_zero(reward: Any) -> None:
    output = reward([word_prompt("CAT")], image=[Image.new("RGB", (64, 64), (230, 230, 230))])
    assert output.rewards == [0.0]
    assert output.extra_info["recognised"] == [""]


def test_lines_are_read_from_the_top() -> None:
    image = Image.new("RGB", (256, 256), "white")
    for row, word in enumerate(("MINT", "TEA")):
        image.paste(Image.fromarray(draw_word(word, rng=np.random.default_rng(row), size=128)), (20, 128 * row))
    output: Any = build_reward("OCR", workers=1)(['a cup with "Mint Tea" on it'], image=[image])
    assert (output.rewards, output.extra_info["recognised"]) == ([1.0], ["MINTTEA"])


def test_several_workers_keep_the_order_and_give_the_same(reward: Any) -> None:
    words = [WORDS[index % 4] for index in range(12)]
    prompts, images = [word_prompt(word) for word in words], [sign(word, seed) for seed, word in enumerate(words)]
    alone = build_reward("OCR", upscale=2, workers=1)(prompts, image=images)
    together = build_reward("OCR", upscale=2, workers=3)(prompts, image=images)
    assert together == alone == reward(prompts, image=images)
    assert together.rewards == [1.0] * 12


def test_grey_and_transparent_images_are_read_too(reward: Any) -> None:
    images = [sign("CAT").convert(mode) for mode in ("L", "RGBA", "P")]
    assert reward([word_prompt("CAT")] * 3, image=images).rewards == [1.0] * 3


def test_pixels_are_enlarged_and_in_the_order_that_the_recogniser_reads() -> None:
    pixels = ocr._pixels(Image.new("RGB", (10, 6), (1, 2, 3)), upscale=3)
    assert pixels.shape == (18, 30, 3)
    assert pixels.reshape(-1, 3).tolist() == [[3, 2, 1]] * 540


def test_it_travels_to_another_process(reward: Any) -> None:
    again = pickle.loads(pickle.dumps(reward))
    assert again.options == reward.options
    prompts, images = [word_prompt("CAT"), word_prompt("OWL")], [sign("CAT"), sign("OWL")]
    assert again(prompts, image=images) == reward(prompts, image=images)


def test_no_samples_no_scores(reward: Any) -> None:
    output = reward([], image=[])
    assert (output.rewards, output.extra_info) == ([], {"recognised": []})


def test_a_prompt_without_a_target_is_told_before_anything_is_read(reward: Any) -> None:
    with pytest.raises(RewardError, match="prompt='a plain sign' has no ASCII double quotes"):
        reward([word_prompt("CAT"), "a plain sign"], image=[None, None])


def test_in_the_engine(reward: Any) -> None:
    engine = RewardEngine([entry("ocr", "OCR", batch_size=2)], factory=lambda arguments: reward)
    table = engine.score(samples(WORDS, [sign(word) for word in WORDS]))
    assert table.column("ocr").tolist() == [1.0] * 4
    assert [text.upper() for text in table.extra_info["ocr"]["recognised"]] == list(WORDS)


# --- what can be missing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_without_its_packages_it_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(RewardError, match=rf"needs {package}, which is not installed: pip install 'tiltflow\[ocr\]'"):
        build_reward("OCR")


def test_models_of_another_version_are_refused_and_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "RECOGNITION_MODEL", "PP-OCRv9_rec.onnx")
    with pytest.raises(RewardError, match=r"reads with PP-OCRv9_rec\.onnx, which is not at .*rapidocr==3\.10"):
        build_reward("OCR")


@pytest.mark.parametrize("options", [{"workers": 0}, {"upscale": 0}, {"detection_side": 8}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(RewardError, match=f"reward 'OCR': {next(iter(options))}: Input should be greater than"):
        build_reward("OCR", **options)


def test_the_models_are_in_the_wheel() -> None:
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    assert all((models / name).stat().st_size > 5_000_000 for name in (ocr.DETECTION_MODEL, ocr.RECOGNITION_MODEL))
