"""A preference set of real text, Python's own manual as it comes with the interpreter: as it is and misspelt."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"


def passages(*, words: tuple[int, int] = (10, 24)) -> list[str]:
    """Return passages of prose, each once."""
    found = []
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            prose = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.:;]) ", prose):
                size = len(sentence.split())
                if words[0] <= size <= words[1] and re.match(r"^[A-Z][\w ,.'\"()*-]+[.:]$", sentence):
                    found.append(sentence)
    return list(dict.fromkeys(found))


def misspelt(text: str, generator: random.Random, *, words: int = 3) -> str:
    """Return the text with two inner letters swapped in some of its longer words."""
    found = text.split()
    places = [place for place, word in enumerate(found) if re.match(r"^[a-z]{5,}$", word)]
    for place in generator.sample(places, min(words, len(places))):
        letters = list(found[place])
        at = generator.choice([i for i in range(1, len(letters) - 2) if letters[i] != letters[i + 1]] or [1])
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
        found[place] = "".join(letters)
    return " ".join(found)


def write_pairs(folder: Path, *, held_out: int = 200, seed: int = 0) -> tuple[Path, Path, list[str]]:
    """Write training and held-out pairs and return both files and the training text."""
    generator = random.Random(seed)
    texts = passages()
    generator.shuffle(texts)
    pairs = [(text, misspelt(text, generator)) for text in texts]
    lines = [json.dumps({"chosen": text, "rejected": other}) for text, other in pairs if text != other]
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    test.write_text("\n".join(lines[:held_out]))
    train.write_text("\n".join(lines[held_out:]))
    return train, test, texts[held_out:]


def save_model(folder: Path, texts: Sequence[str], *, words: int = 1000, width: int = 64, layers: int = 2) -> Path:
    """Write an untrained Llama with a byte-level BPE of `texts`, and return its folder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
