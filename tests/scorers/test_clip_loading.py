"""CLIP from files: strict loading, the tokenizer's places, and one network per process."""

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.scorers.tiny_clip import images, save_clip, save_tokenizer, tiny_backbone, tiny_model, to_open_clip
from tiltflow.errors import RewardError
from tiltflow.scorers import ClipScorer
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.scorers.clip_loading import find_tokenizer, load_clip_checkpoint, load_clip_folder

PROMPTS = ["cat", "a red dog"]


@pytest.fixture(autouse=True)
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty models folder, and none of the hub's cache."""
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "models"


def save_checkpoint(path: Path) -> Path:
    torch.save({"epoch": 3, "name": "tiny", "state_dict": to_open_clip(tiny_model())}, path)
    return path


def expected(kind: str) -> torch.Tensor:
    return ClipScorer(tiny_backbone(), kind=kind).score(images(2), PROMPTS)  # pyright: ignore[reportArgumentType]


# --- folders of transformers ------------------------------------------------------------------------------------------


def test_a_folder_gives_the_scores_of_what_was_saved(tmp_path: Path) -> None:
    scorer = ClipScorer.from_pretrained(save_clip(tmp_path / "clip"), kind="pickscore")
    torch.testing.assert_close(scorer.score(images(2), PROMPTS), expected("pickscore"), atol=1e-4, rtol=0)
    assert not scorer.training
    assert not any(weight.requires_grad for weight in scorer.parameters())


def test_the_logit_scale_keeps_its_precision_in_bfloat16(tmp_path: Path) -> None:
    scorer = ClipScorer.from_pretrained(save_clip(tmp_path / "clip"), kind="pickscore", dtype=torch.bfloat16)
    assert scorer.dtype == torch.bfloat16
    assert scorer.backbone.logit_scale.item() == pytest.approx(100.0, rel=1e-4)  # rounded it would be 98.9


def test_old_index_buffers_are_accepted(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    scorer = ClipScorer.from_pretrained(folder, kind="clip")
    torch.testing.assert_close(scorer.score(images(2), PROMPTS), expected("clip"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "visual_projection.weight",
            "do not fit CLIPModel: missing visual_projection.weight; download the model again",
        ),
        ("extra.weight", "do not fit CLIPModel: unexpected extra.weight"),
        ("logit_scale", "cannot be read|do not fit CLIPModel: missing logit_scale"),
    ],
)
def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path: Path, name: str, message: str) -> None:
    folder = save_clip(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    if name in state:
        del state[name]
    else:
        state[name] = torch.zeros(3)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=message):
        load_clip_folder(folder)


def test_misshapen_weights_are_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    state["text_projection.weight"] = torch.zeros(5, 64)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"text_projection.weight is \[5, 64\] instead of \[32, 64\]"):
        load_clip_folder(folder)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(RewardError, match="holds a model of the type 'siglip', not 'clip'; name the folder of a CLIP"):
        load_clip_folder(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RewardError, match=r"cannot be read: .*; download the model again, or name another folder"):
        load_clip_folder(folder)


# --- checkpoints of open_clip -----------------------------------------------------------------------------------------


def test_a_checkpoint_under_state_dict(tmp_path: Path) -> None:
    words = save_tokenizer(tmp_path / "words")
    path = save_checkpoint(tmp_path / "HPS.pt")
    scorer = ClipScorer.from_open_clip(path, kind="hpsv2", hidden_act="gelu", tokenizer=str(words))
    torch.testing.assert_close(scorer.score(images(2), PROMPTS), expected("hpsv2"), atol=1e-5, rtol=0)


def test_the_tokenizer_is_found_in_the_models_folder(tmp_path: Path, own_models: Path) -> None:
    save_tokenizer(own_models / "clip-vit-large-patch14")
    scorer = ClipScorer.from_open_clip(save_checkpoint(tmp_path / "HPS.pt"), kind="hpsv2", hidden_act="gelu")
    assert scorer.backbone.tokenizer(["cat"])["input_ids"] == [[58, 53, 59]]


def test_the_tokenizer_is_found_in_the_hub_s_cache(tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K"
    save_tokenizer(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert find_tokenizer().eos_token_id == 59
    assert find_tokenizer(name="laion/CLIP-ViT-H-14-laion2B-s32B-b79K").eos_token_id == 59


def test_a_missing_tokenizer_says_what_and_where(tmp_path: Path, own_models: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(RewardError) as raised:
        load_clip_folder(folder)
    message = str(raised.value)
    assert "CLIP's tokenizer was not found (tokenizer.json, or vocab.json and merges.txt)" in message
    assert "hf download openai/clip-vit-large-patch14 tokenizer.json vocab.json merges.txt" in message
    assert f"beside the model in {folder}" in message
    assert str(own_models / "clip-vit-large-patch14") in message


def test_a_named_tokenizer_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="tokenizer='nowhere': it has neither tokenizer"):
        load_clip_checkpoint(save_checkpoint(tmp_path / "HPS.pt"), hidden_act="gelu", tokenizer="nowhere")


def test_a_checkpoint_that_is_absent_or_none_is_refused(tmp_path: Path) -> None:
    words = str(save_tokenizer(tmp_path / "words"))
    with pytest.raises(RewardError, match=r"HPS.pt cannot be read"):
        load_clip_checkpoint(tmp_path / "HPS.pt", hidden_act="gelu", tokenizer=words)
    torch.save({"state_dict": tiny_model().state_dict()}, tmp_path / "HPS.pt")
    with pytest.raises(RewardError, match=r"HPS.pt: .* is missing; it must be a CLIP with a ViT in open_clip's layout"):
        load_clip_checkpoint(tmp_path / "HPS.pt", hidden_act="gelu", tokenizer=words)


# --- one network per process ------------------------------------------------------------------------------------------


def test_equal_weights_are_loaded_once(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    first = load_clip_folder(folder)
    assert load_clip_folder(tmp_path / "." / "clip", device=torch.device("cpu")) is first
    assert load_clip_folder(folder, dtype=torch.bfloat16) is not first
    assert load_clip_folder(folder, share=False) is not first
    assert load_clip_folder(save_clip(tmp_path / "other")) is not first


def test_the_activation_is_part_of_what_is_shared(tmp_path: Path) -> None:
    path, words = save_checkpoint(tmp_path / "HPS.pt"), str(save_tokenizer(tmp_path / "words"))
    exact = load_clip_checkpoint(path, hidden_act="gelu", tokenizer=words)
    quick = load_clip_checkpoint(path, hidden_act="quick_gelu", tokenizer=words)
    assert exact is not quick
    assert load_clip_checkpoint(path, hidden_act="gelu", tokenizer=words) is exact


def test_a_network_that_was_cast_or_made_trainable_is_not_handed_out(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    first = load_clip_folder(folder)
    first.requires_grad_()
    second = load_clip_folder(folder)
    assert second is not first
    second.to(torch.float16)
    assert load_clip_folder(folder) is not second


def test_a_network_that_nobody_uses_is_freed(tmp_path: Path) -> None:
    import weakref

    folder = save_clip(tmp_path / "clip")
    backbone = load_clip_folder(folder)
    backbone.image_features(images(2), ClipScorer(backbone, kind="clip").preprocess)
    gone = weakref.ref(backbone)
    del backbone
    gc.collect()
    assert gone() is None
