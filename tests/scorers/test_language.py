"""Language reward models: where a text is read, what its batch changes (nothing), what transformers makes of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.scorers.tiny_language import END, PAD, save_causal, save_classifier
from tiltflow.errors import RewardError
from tiltflow.scorers import LanguageRewardModel, LoraSettings, RewardHead

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 good", "bad red blue w3 w3"]
TALK = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "good"}]
CAUSAL = ["llama", "qwen2", "gpt2", "granite", "cohere", "mamba"]
IN_TRANSFORMERS = ["llama", "qwen2", "gpt2"]


def load(folder: Path, **options) -> LanguageRewardModel:
    """Load a model whose new head, small at first, tells texts apart."""
    model = LanguageRewardModel.from_pretrained(folder, **options).eval()
    if model.reads_last_token:
        with torch.no_grad():
            model.classifier.score.weight.normal_(generator=torch.Generator().manual_seed(5))
    return model


@pytest.fixture
def llama(tmp_path: Path) -> LanguageRewardModel:
    return load(save_causal(tmp_path / "llama"))


def padded(model: LanguageRewardModel, texts, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch = model.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def transformers_logits(folder: Path, texts, **options) -> torch.Tensor:
    """Return what transformers makes of a folder, without anything of this package."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt", **options)
    with torch.no_grad():
        return classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# --- one text, whatever its batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_score_depends_neither_on_the_batch_nor_on_the_side_of_its_padding(tmp_path, family):
    save = save_classifier if family == "bert" else save_causal
    model = load(save(tmp_path / family, family))
    scores = model.score(TEXTS)
    assert scores.shape == (4,) and scores.dtype == torch.float32
    assert scores.std() > 0.01
    tolerance = 1e-5 * max(1.0, scores.abs().max().item())
    alone = torch.cat([model.score([text]) for text in TEXTS])
    torch.testing.assert_close(alone, scores, atol=tolerance, rtol=0)
    torch.testing.assert_close(model.score(TEXTS, max_tokens=1), scores, atol=tolerance, rtol=0)
    found = model.merged(model(*model.pad([model.encode(text) for text in TEXTS])))
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), scores, atol=tolerance, rtol=0)
    for side in ("left", "right") if model.reads_last_token else ():
        ids, mask = padded(model, TEXTS, side)
        last = (mask * torch.arange(1, ids.shape[1] + 1)).argmax(1, keepdim=True)
        found = model.score_sequence(ids, mask).detach().gather(1, last)[:, 0]
        torch.testing.assert_close(found, scores, atol=tolerance, rtol=0)


def test_the_last_real_token_is_read_even_if_it_is_the_padding_token(llama):
    ids = torch.tensor([[5, 6, llama.tokenizer.pad_token_id, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        hidden = llama.classifier.base_model(input_ids=ids[:, :3]).last_hidden_state[:, -1]
        expected = llama.classifier.score(hidden)[:, 0]
        torch.testing.assert_close(llama.merged(llama(ids, mask.sum(1))), expected)
    with pytest.raises(RewardError, match="row 1 of the batch has no real token"):
        llama.score_sequence(ids.repeat(2, 1), torch.tensor([[1, 1, 1, 0, 0], [0] * 5]))


def test_every_token_has_the_score_that_the_text_up_to_it_has(llama):
    rows = [llama.encode(text) for text in TEXTS]
    for side in ("left", "right"):
        ids, mask = padded(llama, TEXTS, side)
        with torch.no_grad():
            scores = llama.score_sequence(ids, mask)
        assert scores.shape == ids.shape
        assert (scores[mask == 0] == 0).all()
        for row, kept, tokens in zip(scores, mask, rows, strict=True):
            expected = llama.score_encoded([tokens[: n + 1] for n in range(len(tokens))])
            torch.testing.assert_close(row[kept == 1], expected, atol=1e-4, rtol=0)


def test_rows_in_buckets_have_the_scores_and_gradients_of_one_batch(llama):
    ids, lengths = llama.pad([llama.encode(text) for text in TEXTS])
    calls = []
    llama.classifier.base_model.register_forward_hook(lambda *_: calls.append(1))
    expected = llama(ids, lengths)
    expected.square().sum().backward()
    gradient = [weight.grad.clone() for weight in llama.parameters()]
    for options in ({"buckets": 3, "overhead": 0}, {"buckets": 6, "overhead": 0, "steady": True}):
        llama.zero_grad()
        calls.clear()
        found = llama.score_rows(ids, lengths, **options)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        found.square().sum().backward()
        for weight, before in zip(llama.parameters(), gradient, strict=True):
            torch.testing.assert_close(weight.grad, before, atol=1e-3, rtol=1e-4)
        assert len(calls) == options["buckets"]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
@pytest.mark.parametrize("append_eos", [False, True])
def test_saved_folder_is_a_classifier_of_transformers_with_equal_scores(tmp_path, family, append_eos):
    model = load(save_causal(tmp_path / "base", family, pad=END), append_eos=append_eos)
    model.save_pretrained(tmp_path / "saved")
    expected = model.score(TEXTS)
    for side in ("right",) if family == "gpt2" else ("right", "left"):  # GPT-2 counts positions from the padding
        logits = transformers_logits(tmp_path / "saved", TEXTS, padding_side=side)
        torch.testing.assert_close(logits[:, 0], expected, atol=1e-5, rtol=1e-6)
    again = LanguageRewardModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again.score(TEXTS), expected)
    assert again.encode("w1")[-1:] == [1] if append_eos else again.encode("w1")[-1:] != [1]
    config = again.classifier.config
    assert (config.num_labels, config.problem_type, config.id2label) == (1, "regression", {0: "reward"})
    assert config.pad_token_id == again.tokenizer.pad_token_id != config.eos_token_id


def test_architecture_without_classifier_in_transformers_gets_one_of_its_form(tmp_path):
    model = load(save_causal(tmp_path / "base", "granite"))
    model.save_pretrained(tmp_path / "saved")
    again = LanguageRewardModel.from_pretrained(tmp_path / "saved").eval()
    assert again.classifier.config.architectures == ["GraniteForSequenceClassification"]
    assert torch.equal(again.score(TEXTS), model.score(TEXTS))


@pytest.mark.parametrize(("pad", "expected"), [(None, "<|pad|>"), (END, "<|pad|>"), (PAD, PAD)])
def test_new_head_gets_padding_that_is_not_the_end_of_text(tmp_path, pad, expected):
    model = load(save_causal(tmp_path / "base", pad=pad), append_eos=True)
    assert model.tokenizer.pad_token == expected
    assert model.encode("w1")[-1] == model.tokenizer.eos_token_id
    assert model.classifier.config.pad_token_id == model.tokenizer.pad_token_id
    assert model.classifier.config.vocab_size == model.classifier.get_input_embeddings().num_embeddings
    assert model.tokenizer.pad_token_id < model.classifier.config.vocab_size


def test_someone_elses_classifier_whose_padding_ends_texts_scores_as_in_transformers(tmp_path):
    folder = save_classifier(tmp_path / "theirs", pad=END)
    model = LanguageRewardModel.from_pretrained(folder).eval()
    texts = [f"{text} {END}" for text in TEXTS]
    expected = transformers_logits(folder, texts)[:, 0]
    torch.testing.assert_close(model.score(texts), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(model.score(TEXTS), expected, atol=1e-5, rtol=1e-6)


def test_conversations_go_through_the_chat_template(tmp_path, llama):
    tokens = llama.encode(TALK)
    assert llama.tokenizer.decode(tokens) == f"user : w1 w2 {END}assistant : good {END}".replace(f"{END}a", f"{END} a")
    assert llama.score([TALK, "w1"]).shape == (2,)
    mute = load(save_causal(tmp_path / "mute", chat=None))
    with pytest.raises(RewardError, match="no chat template for conversations"):
        mute.score([TALK])
    with pytest.raises(RewardError, match="the chat template refuses"):
        picky = "{{ raise_exception('no') }}"
        load(save_causal(tmp_path / "picky", chat=picky)).score([TALK])


def test_new_head_is_seeded_and_leaves_the_global_generator_alone(tmp_path):
    folder = save_causal(tmp_path / "base")
    state = torch.get_rng_state()
    first, again, other = (LanguageRewardModel.from_pretrained(folder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.classifier.score.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.5 / 33 < weights[0].std() < 1.5 / 33
    assert first.classifier.score.bias is None
    theirs = save_classifier(tmp_path / "theirs", labels=2)
    assert torch.equal(
        LanguageRewardModel.from_pretrained(theirs, new_head=True, seed=1).classifier.score.weight, weights[0]
    )


# --- heads -----------------------------------------------------------------------------------------------------------


def test_attributes_their_weights_and_their_sum(tmp_path):
    folder = save_causal(tmp_path / "base")
    head = RewardHead(num_attributes=3, attribute_names=("a", "b", "c"))
    model = load(folder, head=head)
    attributes = model.score(TEXTS)
    assert attributes.shape == (4, 3)
    for weights in (None, (0.5, -1.0, 2.0)):
        merging = RewardHead(num_attributes=3, attribute_weights=weights, merge_attributes=True)
        expected = attributes @ torch.tensor(weights or (1 / 3,) * 3)
        merged = load(folder, head=merging)
        torch.testing.assert_close(merged.score(TEXTS), expected)
        merged.save_pretrained(tmp_path / "saved")
        assert LanguageRewardModel.from_pretrained(tmp_path / "saved").head == merging
        torch.testing.assert_close(transformers_logits(tmp_path / "saved", TEXTS), attributes, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "named")
    assert LanguageRewardModel.from_pretrained(tmp_path / "named").classifier.config.id2label == {
        0: "a",
        1: "b",
        2: "c",
    }
    with pytest.raises(RewardError, match="gives 3 numbers for num_attributes=2; set that, or ask for a new head"):
        LanguageRewardModel.from_pretrained(tmp_path / "saved", head=RewardHead(num_attributes=2))
    with pytest.raises(ValueError, match="attribute_weights has 1 entries for num_attributes=3"):
        RewardHead(num_attributes=3, attribute_weights=(1.0,))


def test_average_pooling_is_the_mean_over_real_tokens(tmp_path, llama):
    model = LanguageRewardModel(llama.network, llama.tokenizer, RewardHead(average_pooling=True)).eval()
    scores = model.score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = torch.tensor([model.encode(text)])
        with torch.no_grad():
            hidden = model.classifier.base_model(input_ids=ids).last_hidden_state.mean(1)
            torch.testing.assert_close(model.classifier.score(hidden)[0, 0], score, atol=1e-4, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(LanguageRewardModel.from_pretrained(tmp_path / "saved").eval().score(TEXTS), scores)
    bert = save_classifier(tmp_path / "bert", "bert")
    with pytest.raises(RewardError, match="has a head of its own"):
        LanguageRewardModel.from_pretrained(bert, head=RewardHead(average_pooling=True))


def test_head_computes_in_its_own_precision(tmp_path):
    folder = save_causal(tmp_path / "base")
    exact = load(folder).score(TEXTS)
    half = load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.classifier.score.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        scores = half.score(TEXTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores.bfloat16().float(), scores)  # the head's sum was not rounded
    assert (scores - exact).abs().max() < 0.1 * exact.abs().max()
    coarse = LanguageRewardModel.from_pretrained(folder, head=RewardHead(dtype="bfloat16"))
    assert coarse.classifier.score.weight.dtype == torch.bfloat16
    assert coarse.score(TEXTS).dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True])
def test_head_of_a_bfloat16_folder_is_not_rounded(tmp_path, lora):
    model = load(save_causal(tmp_path / "base"), dtype=torch.bfloat16)
    if lora:
        model.add_lora(LoraSettings(rank=1))
    (model.save_adapter if lora else model.save_pretrained)(tmp_path / "saved")
    again = LanguageRewardModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert model.classifier.score.weight.dtype == torch.float32
    assert torch.equal(again.score(TEXTS), model.eval().score(TEXTS))


def test_dropout_can_be_left_out(tmp_path):
    folder = save_causal(tmp_path / "base", "gpt2")
    with_dropout = LanguageRewardModel.from_pretrained(folder).train()
    without = LanguageRewardModel.from_pretrained(folder, dropout=False).train()
    assert not torch.equal(with_dropout.score(TEXTS), with_dropout.score(TEXTS))
    assert torch.equal(without.score(TEXTS), without.score(TEXTS))


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_lora_and_its_head_survive_saving_merging_and_loading(tmp_path, family):
    save = save_classifier if family == "bert" else save_causal
    model = load(save(tmp_path / "base", family))
    before = model.score(TEXTS)
    model.add_lora(LoraSettings(rank=2), seed=3)
    torch.testing.assert_close(model.eval().score(TEXTS), before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name or ".modules_to_save." in name for name in trained)
    assert any(".modules_to_save." in name for name in trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    scores = model.score(TEXTS)
    assert (scores - before).abs().max() > 0.01
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "merged")
    model.save_adapter(tmp_path / "adapter")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    tolerance = 1e-5 * scores.abs().max().item()
    merged = LanguageRewardModel.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged.score(TEXTS), scores, atol=tolerance, rtol=0)
    torch.testing.assert_close(
        transformers_logits(tmp_path / "merged", TEXTS)[:, 0], scores, atol=2 * tolerance, rtol=0
    )
    again = LanguageRewardModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again.score(TEXTS), scores)
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} == trained


def test_what_lora_refuses(tmp_path, llama):
    with pytest.raises(RewardError, match="LoRA: targets=\\('nowhere',\\) of LlamaForSequenceClassification"):
        llama.add_lora(LoraSettings(targets=("nowhere",)))
    with pytest.raises(RewardError, match="has no LoRA; save it whole"):
        llama.save_adapter(tmp_path / "adapter")
    llama.add_lora(LoraSettings(rank=1))
    with pytest.raises(RewardError, match="has LoRA already"):
        llama.add_lora(LoraSettings(rank=1))


# --- what is wrong with a folder -------------------------------------------------------------------------------------


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(RewardError, match="the model no/where was not found"):
        LanguageRewardModel.from_pretrained("no/where")
    broken = save_causal(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(RewardError, match="no language model can be loaded from"):
        LanguageRewardModel.from_pretrained(broken)
    mixed = save_causal(tmp_path / "mixed")
    text = (mixed / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (mixed / "config.json").write_text(text)
    with pytest.raises(RewardError, match="do not fit LlamaForSequenceClassification: 9 are missing, misshapen or"):
        LanguageRewardModel.from_pretrained(mixed)
    with pytest.raises(RewardError, match="was not written by save_adapter"):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        LanguageRewardModel.from_pretrained(tmp_path / "adapter")


def test_text_without_tokens_is_an_error(tmp_path):
    model = load(save_causal(tmp_path / "base", start=False))
    with pytest.raises(RewardError, match="the text '' has no tokens"):
        model.score(["w1", ""])
    assert model.score([]).shape == (0,)


@pytest.mark.parametrize(("family", "expected"), [("llama", 256), ("gpt2", 256), ("mamba", None)])
def test_how_much_can_be_read(tmp_path, family, expected):
    assert LanguageRewardModel.from_pretrained(save_causal(tmp_path / family, family)).max_positions == expected
