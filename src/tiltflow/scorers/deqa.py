"""Image quality in five words: a vision-language model is asked how good an image is, and its next word is weighed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiltflow.errors import RewardError
from tiltflow.scorers.base import Images, Scorer

LEVELS: Final = ("excellent", "good", "fair", "poor", "bad")
VALUES: Final = (5.0, 4.0, 3.0, 2.0, 1.0)
QUESTION: Final = "How would you rate the quality of this image?"
ANSWER: Final = "The quality of the image is"

REMOTE_CODE: Final = (
    "the model must be of a class that transformers itself has; code that comes with weights, as with the published "
    "DeQA-Score-Mix3 (mPLUG-Owl2), is never run"
)


class DeQAScorer(Scorer):
    """Scores technical quality between 1 (bad) and 5 (excellent), from the image alone.

    The model reads the question and the beginning of its answer; the logits z of the five words that may follow give
    score = sum_k softmax(z)_k v_k with v = (5, 4, 3, 2, 1): no other word takes part. Images that are no squares are
    padded to one with the mean colour of the model's preprocessing.

    Source: You et al. 2025, DeQA-Score (arXiv:2501.11561), after Q-Align (arXiv:2312.17090, section 3.2).
    """

    levels: Tensor  # [5] int64, the tokens of the five words

    def __init__(self, model: Any, processor: Any, *, prompt: str | None = None):
        """Wrap a model.

        Args:
            model: A transformers model of images and text to text.
            processor: Its processor.
            prompt: The whole text before the quality word, with the model's placeholder for the image; None builds it
                from question and answer with the processor's chat template.

        Raises:
            RewardError: There is no chat template and no prompt, the five words are no single tokens, or the
                preprocessing has no mean colour.
        """
        super().__init__()
        self.model = model
        self.processor = processor
        self.prompt = _chat_prompt(processor) if prompt is None else prompt
        self.register_buffer("levels", torch.tensor(_level_tokens(processor.tokenizer, self.prompt)), persistent=False)
        self.background = _mean_colour(processor)
        self.freeze()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        prompt: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DeQAScorer":
        """Load a model and its processor from a folder in Hugging Face format; nothing is downloaded.

        Args:
            folder: With `config.json`, weights, tokenizer and preprocessing.
            prompt: As for the constructor.
            device: Where to compute.
            dtype: In which to compute.

        Raises:
            RewardError: The folder holds no such model, or one that needs code of its own, or weights are missing.
        """
        # `trust_remote_code=False` said aloud: left out, transformers asks on the terminal.
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise RewardError(
                f"no vision-language model can be loaded from {folder}: {error}; {REMOTE_CODE}"
            ) from error
        model, report = loaded
        problems = [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]
        if problems:
            raise RewardError(
                f"the weights in {folder} do not fit {type(model).__name__}: {len(problems)} are missing, misshapen or "
                f"unexpected, the first being {problems[0]}; download them again"
            )
        return cls(model, processor, prompt=prompt).to(device)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return the scores, float32 `[B]` in [1, 5]; the pixels are rounded to 8 bits and give no gradient.

        Args:
            images: B images in [0, 1]: `[B, 3, H, W]`, or B tensors `[3, H, W]` of any sizes.
            prompts: Not read.
        """
        return expected_level(self.rate([to_pil(image) for image in images]))

    @torch.no_grad()
    def rate(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the probabilities of the five words, float32 `[B, 5]`, excellent first.

        Raises:
            RewardError: The model ignores the request for the logits of one position.
        """
        if not images:
            return torch.zeros(0, len(LEVELS), device=self.device)
        inputs = self._inputs([pad_to_square(image.convert("RGB"), self.background) for image in images])
        last = inputs["attention_mask"].sum(1) - 1  # padding is on the right: [B]
        kept, places = last.unique(return_inverse=True)
        # Only at these positions: all logits of a batch would be gigabytes.
        logits = self.model(**inputs, use_cache=False, logits_to_keep=kept).logits
        if logits.shape[:2] != (len(images), len(kept)):
            raise RewardError(
                f"{type(self.model).__name__} gave logits of shape {list(logits.shape)} where [{len(images)}, "
                f"{len(kept)}, words] was asked for; it does not support logits_to_keep, use another model"
            )
        rows = torch.arange(len(images), device=logits.device)
        return logits[rows, places][:, self.levels].float().softmax(dim=1)

    def _inputs(self, images: Sequence[Image.Image]) -> Any:
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=[self.prompt] * len(images),
            images=list(images),
            padding=True,
            padding_side="right",
            add_special_tokens=bos is None or not self.prompt.startswith(bos),  # a chat template may bring its own
            return_tensors="pt",
        )
        return inputs.to(self.device, self.dtype)  # dtype: of the floating-point inputs only


def expected_level(probabilities: Tensor) -> Tensor:
    """Return the mean level, `[B]` in [1, 5], of probabilities `[B, 5]` of the five words, excellent first."""
    return probabilities @ torch.tensor(VALUES, dtype=probabilities.dtype, device=probabilities.device)


def pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return an RGB image in the middle of a square whose side is its longer one."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def to_pil(image: Tensor) -> Image.Image:
    """Return an image `[3, H, W]` in [0, 1] with 8 bits per channel.

    Raises:
        RewardError: It has NaN or infinite values, which 8 bits cannot say.
    """
    if not image.sum(dtype=torch.float32).isfinite():
        raise RewardError("an image has NaN or infinite values; give floats in [0, 1]")
    levels = (image.detach().float() * 255).round_().clamp_(0, 255).to("cpu", torch.uint8)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in levels.numpy()])  # sooner done than moving axes


def _chat_prompt(processor: Any) -> str:
    """Build the text up to the quality word with the model's own chat template."""
    if processor.chat_template is None:
        raise RewardError(
            "the model's processor has no chat template; give prompt=, the whole text before the quality word with the "
            f"model's placeholder for the image, such as 'USER: <image>\\n{QUESTION}\\nASSISTANT: {ANSWER}'"
        )
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    return processor.apply_chat_template(messages, tokenize=False, continue_final_message=True)


def _level_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token that each of the five words is when it follows the prompt."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = []
    for word in LEVELS:
        ids = tokenizer(f"{prompt} {word}", add_special_tokens=False)["input_ids"]
        if ids[: len(start)] != start or len(ids) != len(start) + 1 or ids[-1] == tokenizer.unk_token_id:
            raise RewardError(
                f"after the prompt the model's tokenizer has no single token for {word!r}, so that its next word "
                "cannot be weighed; use another model, or a prompt that ends before a space"
            )
        tokens.append(ids[-1])
    return tokens


def _mean_colour(processor: Any) -> tuple[int, int, int]:
    mean = processor.image_processor.to_dict().get("image_mean")
    if not isinstance(mean, list | tuple) or len(mean) != 3:
        raise RewardError(f"the model's preprocessing has image_mean={mean!r}; padding needs one number per colour")
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue
