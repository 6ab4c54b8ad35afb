"""Models that judge images behind an OpenAI-compatible endpoint: asking one, and reading what it answers."""

import base64
import importlib
import io
import math
import os
from collections.abc import Mapping
from typing import Any, Final

from PIL import Image
from pydantic import Field

from tiltflow.errors import RewardError
from tiltflow.types import Config

TOP_LOGPROBS: Final = 20  # the most that endpoints give
NO_KEY: Final = "none"  # sent to servers that ask for none; the client refuses an empty one


class EndpointSettings(Config):
    """Where a judge answers and how patient to be with it."""

    base_url: str  # such as http://localhost:8000/v1
    model: str  # its name there
    api_key_env: str | None = None  # the environment variable that holds the key; None: the server asks for none
    timeout: float = Field(default=60.0, gt=0)  # seconds per request
    max_retries: int = Field(default=3, ge=0)  # after the first try, with growing pauses


def open_client(settings: EndpointSettings) -> Any:
    """Return an `openai.OpenAI` client, which threads may share.

    Raises:
        RewardError: The package is not installed, or the key's environment variable is not set.
    """
    openai = _openai(settings)
    key = NO_KEY if settings.api_key_env is None else os.environ.get(settings.api_key_env, "")
    if not key:
        raise RewardError(f"api_key_env={settings.api_key_env!r}: this environment variable is not set or empty")
    return openai.OpenAI(
        base_url=settings.base_url, api_key=key, timeout=settings.timeout, max_retries=settings.max_retries
    )


class ChatEndpoint:
    """A vision-language model behind an OpenAI-compatible endpoint."""

    def __init__(self, settings: EndpointSettings):
        """Prepare a client; nothing is sent yet.

        Raises:
            RewardError: As `open_client`.
        """
        self.settings = settings
        self._client = open_client(settings)
        self._name = f"the judge {settings.model!r} at {settings.base_url}"

    def __reduce__(self) -> tuple[type["ChatEndpoint"], tuple[EndpointSettings]]:
        """Pickle as the settings: connections stay where they are, and the key is never written."""
        return ChatEndpoint, (self.settings,)

    def first_token(self, image: Image.Image, question: str, *, answer: str | None = None) -> dict[str, float]:
        """Ask about an image and return the most probable first tokens of the answer with their log-probabilities.

        Args:
            image: Sent as PNG, so that nothing is lost.
            question: Follows the image.
            answer: The beginning of the answer, to be continued. vLLM and SGLang can do that; other servers reject the
                request or begin anew.

        Raises:
            RewardError: The endpoint cannot be reached or refuses, or its answer has no log-probabilities.
        """
        content = [{"type": "image_url", "image_url": {"url": _data_url(image)}}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        extra: dict[str, Any] | None = None
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
            extra = {"add_generation_prompt": False, "continue_final_message": True}
        openai = _openai(self.settings)
        try:
            response = self._client.chat.completions.create(
                model=self.settings.model,
                messages=messages,
                temperature=0.0,
                max_completion_tokens=1,
                logprobs=True,
                top_logprobs=TOP_LOGPROBS,
                extra_body=extra,
            )
        except openai.OpenAIError as error:
            raise RewardError(f"{self._name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(response, openai.types.chat.ChatCompletion):
            raise RewardError(f"{self._name} answered with no chat completion; base_url usually ends with /v1")
        logprobs = response.choices[0].logprobs if response.choices else None
        if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
            raise RewardError(
                f"{self._name} answered without log-probabilities; use a server and a model that give top_logprobs"
            )
        return {entry.token: entry.logprob for entry in logprobs.content[0].top_logprobs}


def _openai(settings: EndpointSettings) -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise RewardError(
            f"base_url={settings.base_url!r} needs the package openai: pip install 'tiltflow[judge]'"
        ) from error


def weigh_words(logprobs: Mapping[str, float], words: tuple[str, ...], *, min_mass: float) -> list[float]:
    """Return the probability of each word among these words, from the log-probabilities of first tokens.

    Spellings of one word (" Good", "good") count together. A word that is not among the tokens given is less probable
    than all that are, and counts as zero.

    Args:
        logprobs: Token -> log-probability.
        words: In lower case.
        min_mass: How probable the words must be together for the answer to be one of them.

    Raises:
        RewardError: They are less probable than that: the judge is saying something else.
    """
    masses = dict.fromkeys(words, 0.0)
    for token, logprob in logprobs.items():
        word = token.strip(" \t\n▁Ġ").lower()  # the last two: how some servers spell a token's leading space
        if word in masses:
            masses[word] += math.exp(logprob)
    total = sum(masses.values())
    if total <= 0 or total < min_mass:
        likely = sorted(logprobs, key=lambda token: -logprobs[token])[:3]
        raise RewardError(
            f"the judge's first word is none of {', '.join(words)}: together they have probability {total:.2g}, less "
            f"than {min_mass:g}; the likeliest are {likely}"
        )
    return [mass / total for mass in masses.values()]


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
