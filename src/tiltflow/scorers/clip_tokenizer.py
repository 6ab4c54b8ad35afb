"""A tokenizer in CLIP's form, learnt from a few captions, for small models that are made from nothing."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


def build_tokenizer(captions: Sequence[str], *, max_length: int) -> CLIPTokenizer:
    """Learn a byte-level BPE in CLIP's form from `captions`; unknown words fall back to bytes, never to an error.

    Without captions there is nothing to learn, and every letter is a token (another one at the end of a word).
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        min_frequency=1,
        # Pairs that occur equally often are merged in the order of their letters' numbers. Those of letters that end a
        # word change from run to run unless they are given here: one set of captions shall make one tokenizer.
        special_tokens=[start, end, *(byte + "</w>" for byte in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # As CLIP numbers them: letters, letters that end a word, merged ones.
    symbols = [start, end, *alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=max_length,
    )
