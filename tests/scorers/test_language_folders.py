"""Folders of others: heads that are missing or called otherwise, padding on which config and tokenizer disagree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.scorers.tiny_language import END, PAD, WORDS, save_causal, save_classifier
from tiltflow.errors import RewardError
from tiltflow.scorers import LanguageRewardModel, LoraSettings, RewardHead

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 good", "bad red blue w3 w3"]


def alone(folder: Path, texts) -> torch.Tensor:
    """Return what transformers makes of each text on its own."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([classifier(tokenizer(text, return_tensors="pt")["input_ids"]).logits[:, 0] for text in texts])


def edited(folder: Path, **values) -> Path:
    """Change the config of a folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def with_head(folder: Path, name: str, *, rows: int = 1) -> torch.Tensor:
    """Write a head under some name among the weights of a causal language model, as other trainers do."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.randn(rows, 32, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edited(folder, architectures=["LlamaForRewardModel"])
    return weights[name]


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_head_is_refused_where_one_is_required(tmp_path):
    folder = save_causal(tmp_path / "base")
    with pytest.raises(RewardError, match="holds LlamaForCausalLM, which has no trained head: its rewards would be"):
        LanguageRewardModel.from_pretrained(folder, require_head=True)
    LanguageRewardModel.from_pretrained(folder).save_pretrained(tmp_path / "model")
    LanguageRewardModel.from_pretrained(tmp_path / "model", require_head=True)
    bert = save_classifier(tmp_path / "bert", "bert")
    LanguageRewardModel.from_pretrained(bert, require_head=True)
    with pytest.raises(RewardError, match="no trained head"):
        LanguageRewardModel.from_pretrained(edited(bert, architectures=["BertModel"]), require_head=True, new_head=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("score.weight", {}),
        ("value_head.weight", {}),
        ("my_reward.weight", {"value_head_prefix": "my_reward"}),
    ],
)
def test_the_head_of_another_trainer_is_loaded(tmp_path, name, config):
    folder = save_causal(tmp_path / "theirs", pad=END)
    weight = with_head(folder, name)
    edited(folder, **config)
    model = LanguageRewardModel.from_pretrained(folder, require_head=True).eval()
    assert torch.equal(model.classifier.score.weight, weight)
    text = f"w1 w2 {END}"  # its trainer read the score at the end-of-text token
    assert model.encode(text) == [0, 3 + WORDS.index("w1"), 3 + WORDS.index("w2"), 1]
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(alone(tmp_path / "saved", [text]), model.score([text]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "rows"), [("v_head.summary.weight", 1), ("value_head.weight", 3)])
def test_a_head_that_cannot_be_loaded_is_not_dropped_in_silence(tmp_path, name, rows):
    folder = save_causal(tmp_path / "theirs")
    weight = with_head(folder, name, rows=rows)
    with pytest.raises(RewardError, match="has a head of its own that does not fit LlamaForSequenceClassification"):
        LanguageRewardModel.from_pretrained(folder)
    new = LanguageRewardModel.from_pretrained(folder, new_head=True).classifier.score.weight
    assert not torch.equal(new, weight[:1])


def test_names_of_labels_are_kept(tmp_path):
    folder = save_classifier(tmp_path / "theirs", labels=2)
    edited(folder, id2label={"0": "safe", "1": "helpful"}, label2id={"safe": 0, "helpful": 1})
    LanguageRewardModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert LanguageRewardModel.from_pretrained(tmp_path / "saved").classifier.config.id2label == {
        0: "safe",
        1: "helpful",
    }
    plain = save_classifier(tmp_path / "plain", labels=2)
    LanguageRewardModel.from_pretrained(plain).save_pretrained(tmp_path / "saved")
    assert LanguageRewardModel.from_pretrained(tmp_path / "saved").classifier.config.id2label == {
        0: "attribute_0",
        1: "attribute_1",
    }


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 1, 3, -1])
@pytest.mark.parametrize("pad", [None, END, PAD])
def test_a_classifier_reads_texts_by_its_own_padding(tmp_path, own, pad):
    folder = edited(save_classifier(tmp_path / "theirs", pad=pad), pad_token_id=own)
    model = LanguageRewardModel.from_pretrained(folder).eval()
    texts = [*TEXTS, *(f"{text} {END}" for text in TEXTS), f"w1 w0 {END} {END}", "w1 w0 w0"]
    torch.testing.assert_close(model.score(texts), alone(folder, texts), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(alone(tmp_path / "saved", texts), model.score(texts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new_head", [False, True])
def test_adapter_of_a_classifier_whose_padding_ends_texts_is_read_as_it_was_trained(tmp_path, new_head):
    folder = save_classifier(tmp_path / "theirs", pad=END)
    model = LanguageRewardModel.from_pretrained(folder, new_head=new_head).eval()
    model.add_lora(LoraSettings(rank=2))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    model.save_adapter(tmp_path / "adapter")
    again = LanguageRewardModel.from_pretrained(tmp_path / "adapter").eval()
    texts = [*TEXTS, f"w1 {END}"]
    assert again.encode(texts[-1]) == model.encode(texts[-1])
    assert torch.equal(again.score(texts), model.score(texts))
    again.save_pretrained(tmp_path / "merged")
    scores = model.score(texts)
    torch.testing.assert_close(alone(tmp_path / "merged", texts), scores, atol=1e-5 * scores.abs().max().item(), rtol=0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = classifier(**batch).logits[:, 0]
    torch.testing.assert_close(logits, scores, atol=1e-5 * scores.abs().max().item(), rtol=0)


def test_what_an_adapter_and_a_classifier_that_pads_with_its_end_refuse(tmp_path):
    folder = save_classifier(tmp_path / "theirs", pad=END)
    with pytest.raises(RewardError, match=r"append_eos: the classifier in .* takes its end-of-text token for padding"):
        LanguageRewardModel.from_pretrained(folder, append_eos=True)
    assert LanguageRewardModel.from_pretrained(folder, append_eos=True, new_head=True).encode("w1")[-1] == 1
    model = LanguageRewardModel.from_pretrained(save_causal(tmp_path / "base"))
    model.add_lora(LoraSettings(rank=1))
    model.save_adapter(tmp_path / "adapter")
    with pytest.raises(RewardError, match=r"new_head=True: the adapter in .* brings its head"):
        LanguageRewardModel.from_pretrained(tmp_path / "adapter", new_head=True)
    assert LanguageRewardModel.from_pretrained(tmp_path / "adapter").encode("w1")[-1] != 1
    assert LanguageRewardModel.from_pretrained(tmp_path / "adapter", append_eos=True).encode("w1")[-1] == 1


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_roberta_is_read_up_to_its_last_position(tmp_path):
    model = LanguageRewardModel.from_pretrained(save_classifier(tmp_path / "roberta", "roberta")).eval()
    assert model.max_positions == 30  # of 34 rows, of which those up to the padding token's, 3, are for padding
    scores = model.score(["w1 " * 29, "w2 " * 12])
    assert scores.isfinite().all()
    assert model.head == RewardHead()
