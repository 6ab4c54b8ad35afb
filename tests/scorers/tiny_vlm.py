"""Small random vision-language models of real classes, with tokenizer and preprocessing: nothing is downloaded."""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tiltflow.scorers.deqa import ANSWER, LEVELS, QUESTION

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} "
    "{% endfor %}"
)
PINPOINTS = [[28, 56], [56, 28], [56, 56]]  # sizes into which llava_next cuts an image: larger ones are more tokens


def save_vlm(
    folder: Path,
    kind: Literal["llava", "llava_next"] = "llava",
    *,
    levels: tuple[str, ...] = LEVELS,
    template: str | None = TEMPLATE,
) -> Path:
    """Write a model whose vocabulary has the words of question and answer and `levels`, and return its folder."""
    words = list(dict.fromkeys([*SPECIAL, *QUESTION.split(), *ANSWER.split(), *levels]))
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(words),
        initializer_range=0.5,  # so that images differ
    )
    image_token = words.index("<image>")
    shared: dict[str, Any] = {
        "tokenizer": _tokenizer(words),
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": template,
    }
    size: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    torch.manual_seed(2)
    if kind == "llava":
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
        processor = LlavaProcessor(image_processor=CLIPImageProcessorPil(**size), **shared)
    else:
        config = LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=image_token, image_grid_pinpoints=PINPOINTS
        )
        LlavaNextForConditionalGeneration(config).save_pretrained(folder)
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **size)
        processor = LlavaNextProcessor(image_processor=images, **shared)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
