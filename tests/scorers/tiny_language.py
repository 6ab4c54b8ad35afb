"""Tiny language models of the real classes, random, with a tokenizer of words; written as folders."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    RobertaConfig,
)

WORDS = [f"w{number}" for number in range(40)]
WORDS += ["user", "assistant", "system", ":", "a", "b", "c", "good", "bad", "red", "blue", ".", "!"]
START, END, UNKNOWN, PAD = "<s>", "</s>", "<unk>", "<pad>"
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}


def word_tokenizer(*, pad: str | None = None, start: bool = True, chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Return a tokenizer for WORDS that begins texts with START; `pad` is one of the special tokens, or none."""
    special = _special(pad)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, unk_token=UNKNOWN, pad_token=pad
    )
    made.chat_template = chat
    return made


def qwen_tokenizer(*, pad: str | None = None, chat: str | None = CHAT) -> Qwen2Tokenizer:
    """Return a tokenizer of bytes: transformers reads every tokenizer beside a Qwen2 as one of Qwen2's own form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: place for place, symbol in enumerate([*_special(pad), *alphabet])}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=UNKNOWN, eos_token=END, pad_token=pad)
    made.chat_template = chat
    return made


def _special(pad: str | None) -> list[str]:
    return [START, END, UNKNOWN, *([PAD] if pad == PAD else [])]


def config_of(family: str, words: int) -> Any:
    """Return a tiny config of a family."""
    common = {"vocab_size": words, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    match family:
        case "llama":
            return LlamaConfig(**common, **ROTARY)
        case "qwen2":
            return Qwen2Config(**common, **ROTARY)
        case "gpt2":
            return GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256)
        case "granite":
            return GraniteConfig(**common, **ROTARY)
        case "cohere":
            return CohereConfig(**common, **ROTARY)
        case "mamba":
            return MambaConfig(**common, hidden_size=32, num_hidden_layers=2, state_size=4)
        case "roberta":
            sizes = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 34}
            return RobertaConfig(**{**common, "pad_token_id": 1}, **sizes)
        case _:
            return BertConfig(**{**common, "pad_token_id": 0}, **SIZES, intermediate_size=64)


def save_causal(folder: Path, family: str = "llama", *, seed: int = 0, pad: str | None = None, **words: Any) -> Path:
    """Write a causal language model with its tokenizer and return its folder."""
    return _save(folder, AutoModelForCausalLM, family, seed, _tokenizer(family, pad, words))


def save_classifier(
    folder: Path, family: str = "llama", *, labels: int = 1, seed: int = 0, pad: str | None = PAD, **words: Any
) -> Path:
    """Write a sequence classifier, as someone else would have, and return its folder."""
    tokenizer = _tokenizer(family, pad, words)
    return _save(folder, AutoModelForSequenceClassification, family, seed, tokenizer, labels=labels)


def _tokenizer(family: str, pad: str | None, words: dict[str, Any]) -> Any:
    return qwen_tokenizer(pad=pad, **words) if family == "qwen2" else word_tokenizer(pad=pad, **words)


def _save(folder: Path, kind: Any, family: str, seed: int, tokenizer: Any, labels: int | None = None) -> Path:
    config = config_of(family, len(tokenizer))
    if labels is not None:
        config.num_labels = labels
        config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    model = kind.from_config(config)
    with torch.no_grad():  # random weights of transformers' size hardly tell texts apart
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
