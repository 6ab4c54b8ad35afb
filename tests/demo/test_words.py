"""The drawn world of words: its list, its splits, its signs (which RapidOCR reads), and pretraining on them."""

import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from tiltflow.cli import main
from tiltflow.commands import EMBEDDED_MODELS, build_policy
from tiltflow.config import load_run_config
from tiltflow.demo.words import FONT_FILE, DrawnWords, all_words, draw_word, split_prompts, word_prompt
from tiltflow.errors import ConfigError
from tiltflow.policies.tiny_sd3 import TinySD3Config
from tiltflow.rewards import build_reward
from tiltflow.scorers.clip_tokenizer import build_tokenizer


def words_of(split: str) -> list[str]:
    return [line["word"] for line in split_prompts("train" if split == "train" else "test")]


# --- words and prompts ------------------------------------------------------------------------------------------------


def test_a_few_hundred_words_of_two_to_four_capital_letters() -> None:
    words = all_words()
    assert len(words) == len(set(words)) == 537
    assert {len(word) for word in words} == {2, 3, 4}
    assert set("".join(words)) == set(string.ascii_uppercase)


def test_a_prompt_quotes_its_word() -> None:
    assert word_prompt("CAT") == 'a sign that says "CAT"'
    line = next(line for line in split_prompts("train") if line["word"] == "SUN")
    assert line == {"prompt": 'a sign that says "SUN"', "word": "SUN", "tag": "three_letters"}


def test_the_splits_are_the_world_and_share_no_word() -> None:
    train, test = words_of("train"), words_of("test")
    assert sorted(train + test) == sorted(all_words())
    for length in (2, 3, 4):
        held_out = sum(len(word) == length for word in test)
        assert held_out == pytest.approx(0.2 * sum(len(word) == length for word in all_words()), abs=1)


def test_the_split_never_changes() -> None:
    assert [word for word in words_of("test") if len(word) == 2] == ["DO", "GO", "IT", "ME", "MY"]


def test_every_letter_of_a_held_out_word_is_trained_at_an_end_or_before_it() -> None:
    def letters(words: list[str]) -> set[tuple[str, bool]]:
        return {(letter, index == len(word) - 1) for word in words for index, letter in enumerate(word)}

    assert letters(words_of("test")) <= letters(words_of("train"))  # they are different tokens


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_sign_is_dark_on_light_and_keeps_its_border() -> None:
    for seed, word in enumerate(all_words()):
        image = draw_word(word, rng=np.random.default_rng(seed))
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        dark = image.mean(axis=2) < 130
        rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
        assert rows[0] >= 2 and rows[-1] <= 61 and columns[0] >= 2 and columns[-1] <= 61, word
        assert columns[-1] - columns[0] >= 20, word
        assert image[~dark].mean() > 190


def test_the_same_seed_draws_the_same_sign_and_another_one_moves_it() -> None:
    first, again, other = (draw_word("CAT", rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_a_larger_image_shows_the_same_sign() -> None:
    small, large = (draw_word("CAT", rng=np.random.default_rng(3), size=size) for size in (64, 128))
    shrunk = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(shrunk.astype(int) - small).mean() < 3


def test_clean_signs_are_read_exactly() -> None:
    """At least 99 of 100, words and places drawn at random; every word of the list was read when it was made."""
    rng = np.random.default_rng(0)
    words = [all_words()[int(index)] for index in rng.integers(len(all_words()), size=100)]
    images = [Image.fromarray(draw_word(word, rng=rng)) for word in words]
    output = build_reward("OCR")([word_prompt(word) for word in words], image=images)
    exact = [read.upper() == word for read, word in zip(output.extra_info["recognised"], words, strict=True)]
    assert sum(exact) >= 99
    assert all(reward == 1 for reward, same in zip(output.rewards, exact, strict=True) if same)


def test_the_font_s_licence_comes_along() -> None:
    text = (FONT_FILE.parent / "LICENSE-DejaVu.txt").read_text()
    assert "Bitstream Vera Fonts Copyright" in text and "Permission is hereby granted" in text


# --- pretraining ------------------------------------------------------------------------------------------------------


def test_pretraining_draws_training_words_only_and_knows_every_caption() -> None:
    source = DrawnWords()
    assert set(source.captions) == {word_prompt(word) for word in all_words()}
    images, captions = source.draw(300, seed=5)
    assert tuple(images.shape) == (300, 3, 64, 64)
    assert set(captions) <= {word_prompt(word) for word in words_of("train")}
    again, same = source.draw(300, seed=5)
    assert (images == again).all() and captions == same


def test_its_tokenizer_spells_every_prompt() -> None:
    tokenizer = build_tokenizer((), max_length=24)
    for word in all_words():
        ids = tokenizer(word_prompt(word)).input_ids
        tokens = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
        assert tokens[1:-1] == list(word_prompt(word).replace(" ", "").lower())
        assert len(ids) <= 24


def test_words_stay_tokens_unless_letters_are_asked_for() -> None:
    assert TinySD3Config().tokens == "words"
    tokenizer = build_tokenizer(["a sign that says"], max_length=16)
    assert len(tokenizer("a sign that says").input_ids) == 6


def test_the_packaged_config_pretrains_a_model_of_letters(tmp_path, capsys) -> None:
    small = {
        "output_dir": str(tmp_path / "run"),
        "model.vae_channels": "[8, 8, 8]",
        "model.layers": "1",
        "model.heads": "1",
        "model.text_widths": "[32, 32]",
        "model.text_layers": "[1, 1]",
        "autoencoder.steps": "2",
        "autoencoder.batch_size": "4",
        "autoencoder.pool_size": "8",
        "pool_size": "8",
        "steps": "2",
        "train_batch": "8",
        "warmup_steps": "1",
        "bf16": "false",
    }
    small["batch_size"] = small.pop("train_batch")
    assert main(["pretrain", "tiny_words", *(word for key in small for word in (f"--{key}", small[key]))]) == 0
    capsys.readouterr()
    model = tmp_path / "run" / "model"
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.tokenizer(word_prompt("CATS")).input_ids) == 21
    image = pipe(word_prompt("CATS"), height=64, width=64, num_inference_steps=1, max_sequence_length=1).images[0]
    assert image.size == (64, 64)
    card = (model / "README.md").read_text()
    assert "# tiny_words" in card and "tiltflow pretrain tiny_words" in card and word_prompt(all_words()[0]) in card


def test_an_install_without_the_weights_says_how_to_make_them(tmp_path, monkeypatch) -> None:
    embedded = replace(EMBEDDED_MODELS["tiny_words"], folder=tmp_path / "none")
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny_words", embedded)
    with pytest.raises(ConfigError, match=r"model_name='tiny_words': this install does not have .*pretrain tiny_words"):
        build_policy(load_run_config("words_ram").policy, device=torch.device("cpu"), seed=0)
