"""Models that judge images behind an OpenAI-compatible endpoint: asking one, and reading what it answers."""

import base64
import importlib
import io
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from PIL import Image
from pydantic import AfterValidator, Field, JsonValue

from tiltflow.errors import JudgeError, RewardError, UnparsableError
from tiltflow.rewards.replies import DiskReplies, Replies, Reply, request_key
from tiltflow.types import Config

T = TypeVar("T")
Content = Sequence[Image.Image | str]  # one turn of a conversation

TOP_LOGPROBS: Final = 20  # the most that most endpoints give
NO_KEY: Final = "EMPTY"  # sent to servers that ask for none; the client refuses an empty one
CONNECT_TIMEOUT: Final = 5.0  # seconds: a server that is there accepts at once
NEVER: Final = -9999.0  # how servers write a log-probability of minus infinity, which JSON cannot
TOKEN_ID: Final = "token_id:"  # how servers write a token whose id was asked for


def _check_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("it must begin with http:// or https://, and usually ends with /v1")
    return text


Url = Annotated[str, AfterValidator(_check_url)]


class EndpointOptions(Config):
    """How to ask a model behind an endpoint: the options of every reward that does."""

    api_key: str = Field(default=NO_KEY, min_length=1)  # configs are logged: a secret belongs into api_key_env
    api_key_env: str | None = None  # the environment variable that holds the key
    max_concurrent: int = Field(default=8, ge=1, le=1000)  # requests at once, of all threads together
    max_retries: int = Field(default=3, ge=0)  # after the first try, with growing pauses
    max_cache_size: int = Field(default=1024, ge=0)  # replies that are remembered; 0: none
    cache_dir: str | None = None  # where replies outlive the process; None: nowhere
    cache_limit_mib: float = Field(default=1024.0, gt=0)  # of the files in cache_dir
    extra_body: Mapping[str, JsonValue] = Field(default_factory=dict[str, JsonValue])  # more keys for every request


class JudgeOptions(EndpointOptions):
    """Where a judge answers, in the words of the judge rewards."""

    api_base_url: Url = "http://localhost:8000/v1"
    vlm_model: str = Field(min_length=1)  # as the server calls it


class EndpointSettings(EndpointOptions):
    """Where a judge answers, and how to ask it."""

    base_url: Url  # such as http://localhost:8000/v1
    model: str  # its name there
    timeout: float = Field(default=60.0, gt=0)  # seconds per request

    @classmethod
    def of(cls, options: EndpointOptions, *, base_url: str, model: str, timeout: float) -> "EndpointSettings":
        """Return the settings that a reward's options make."""
        shared = options.model_dump(include=set(EndpointOptions.model_fields))
        return cls(base_url=base_url, model=model, timeout=timeout, **shared)


class ChatEndpoint:
    """A vision-language model behind an OpenAI-compatible endpoint.

    Any number of threads may ask; together they have `max_concurrent` requests on the way over one pool of connections.
    Failing requests are tried again by the client of the openai package and by nothing else: connection errors,
    timeouts and the status codes 408, 409, 429 and 5xx, after min(0.5 * 2^n, 8) seconds less up to a quarter by chance,
    or after what `Retry-After` says if that is at most two minutes (if it is more, there is no further try).
    """

    def __init__(self, settings: EndpointSettings):
        """Prepare a client; nothing is sent yet.

        Raises:
            RewardError: The package openai is not installed, there is no key, or the cache's folder cannot be used.
        """
        self.settings = settings
        self._openai = _openai(settings)
        self._client = _client(self._openai, settings)
        self.close = weakref.finalize(self, self._client.close)  # also when the endpoint is no longer needed
        self._slots = threading.BoundedSemaphore(settings.max_concurrent)
        disk = None
        if settings.cache_dir is not None:
            disk = DiskReplies(Path(settings.cache_dir).expanduser(), limit=settings.cache_limit_mib * 2**20)
        self._replies = Replies(settings.max_cache_size, disk)
        self._name = f"the judge {settings.model!r} at {settings.base_url}"

    def __reduce__(self) -> tuple[type["ChatEndpoint"], tuple[EndpointSettings]]:
        """Pickle as the settings: connections stay where they are, and a key from the environment is not written."""
        return ChatEndpoint, (self.settings,)

    def first_token(
        self,
        content: Content,
        read: Callable[[Mapping[str, float]], T],
        *,
        answer: str | None = None,
        top_logprobs: int = TOP_LOGPROBS,
        token_ids: Sequence[int] = (),
    ) -> T:
        """Ask, and return what `read` makes of the first token that the answer may have.

        Args:
            content: Images, sent as PNG so that nothing is lost, and text, in the order in which the model reads them.
            read: Called with the likeliest first tokens and their log-probabilities; raises JudgeError if it can do
                nothing with them. What it cannot read is not remembered.
            answer: The beginning of the answer, to be continued. vLLM and SGLang can do that; other servers reject the
                request or begin anew.
            top_logprobs: How many tokens to ask for.
            token_ids: The tokens to ask for instead, written "token_id:9693" in the answer. Recent versions of
                vLLM can tell them (`logprob_token_ids`); other servers reject the request or tell the likeliest.

        Raises:
            JudgeError: The endpoint cannot be reached or refuses, its answer has no log-probabilities, or `read`
                raised.
        """
        messages = [_turn("user", content)]
        extra: dict[str, Any] = {}
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        if token_ids:
            extra |= {"logprob_token_ids": list(token_ids), "return_tokens_as_token_ids": True}
        sampling = {"temperature": 0.0, "max_completion_tokens": 1, "logprobs": True, "top_logprobs": top_logprobs}
        return self._ask(messages, sampling, extra, lambda reply: read(self._first_tokens(reply)))

    def text(
        self, system: str, content: Content, read: Callable[[str], T], *, temperature: float, max_tokens: int
    ) -> T:
        """Ask, and return what `read` makes of the answer's text.

        Args:
            system: The turn before the question.
            content: As `first_token`.
            read: Called with a whole answer; raises JudgeError if it can do nothing with it.
            temperature: Of sampling; 0 takes the likeliest token each time.
            max_tokens: After so many the answer is cut off, and an error.

        Raises:
            JudgeError: The endpoint cannot be reached or refuses, its answer is empty or cut off, or `read` raised.
        """
        messages = [{"role": "system", "content": system}, _turn("user", content)]
        sampling = {"temperature": temperature, "max_completion_tokens": max_tokens}
        return self._ask(messages, sampling, {}, lambda reply: read(self._whole_text(reply, max_tokens)))

    def _ask(
        self, messages: Sequence[Any], sampling: Mapping[str, Any], extra: Mapping[str, Any], read: Callable[[Reply], T]
    ) -> T:
        request = {"model": self.settings.model, "messages": messages, **sampling}
        extra = {**extra, **self.settings.extra_body}
        key = request_key({**request, "extra_body": extra})
        return self._replies.get(key, lambda: self._send(request, extra), read)

    def _send(self, request: Mapping[str, Any], extra: Mapping[str, Any]) -> Reply:
        try:
            with self._slots:
                response = self._client.chat.completions.create(**request, extra_body=extra or None)
        except self._openai.OpenAIError as error:
            raise JudgeError(f"{self._name} failed: {_causes(error)}") from error
        if not isinstance(response, self._openai.types.chat.ChatCompletion):
            raise JudgeError(f"{self._name} answered with no chat completion; base_url usually ends with /v1")
        try:
            return _reply(response)
        except (AttributeError, TypeError, ValueError) as error:  # the client believes servers without checking
            raise JudgeError(f"{self._name} answered with a malformed chat completion: {error}") from error

    def _first_tokens(self, reply: Reply) -> Mapping[str, float]:
        if not reply.first_tokens:
            raise JudgeError(
                f"{self._name} answered without log-probabilities; use a server and a model that give top_logprobs"
            )
        return reply.first_tokens

    def _whole_text(self, reply: Reply, max_tokens: int) -> str:
        if not reply.text.strip():
            raise UnparsableError(f"{self._name} gave an empty answer (finish_reason={reply.finish_reason!r})")
        if reply.finish_reason == "length":
            raise UnparsableError(f"{self._name} gave an answer that was cut off; raise max_tokens={max_tokens}")
        return reply.text


def _openai(settings: EndpointSettings) -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise RewardError(
            f"base_url={settings.base_url!r} needs the package openai: pip install 'tiltflow[judge]'"
        ) from error


def _client(openai: Any, settings: EndpointSettings) -> Any:
    key = settings.api_key
    if settings.api_key_env is not None:
        if key != NO_KEY:
            raise RewardError(f"api_key and api_key_env={settings.api_key_env!r} are both given; leave one out")
        key = os.environ.get(settings.api_key_env, "")
    if not key:
        raise RewardError(f"api_key_env={settings.api_key_env!r}: this environment variable is not set or empty")
    timeout = openai.Timeout(settings.timeout, connect=min(settings.timeout, CONNECT_TIMEOUT))
    return openai.OpenAI(base_url=settings.base_url, api_key=key, timeout=timeout, max_retries=settings.max_retries)


def _reply(response: Any) -> Reply:
    if not response.choices:
        return Reply(text="")
    choice = response.choices[0]
    first = None
    if choice.logprobs is not None and choice.logprobs.content:
        first = {entry.token: _finite(entry.logprob) for entry in choice.logprobs.content[0].top_logprobs or ()}
    return Reply(text=choice.message.content or "", finish_reason=choice.finish_reason, first_tokens=first)


def _turn(role: str, content: Content) -> dict[str, Any]:
    return {"role": role, "content": [_part(part) for part in content]}


def _part(part: Image.Image | str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    buffer = io.BytesIO()
    part.save(buffer, format="PNG", compress_level=1)  # level 6 takes twice as long for a tenth fewer bytes
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _finite(logprob: float) -> float:
    if math.isnan(logprob):
        raise ValueError("a log-probability is NaN")
    return max(logprob, NEVER)


def _causes(error: BaseException) -> str:
    """Return an error with what is behind it: the client says only "Connection error."."""
    cause = error.__cause__
    behind = f" ({type(cause).__name__}: {cause})" if cause is not None else ""
    return f"{type(error).__name__}: {error}{behind}"


def word_masses(logprobs: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """Return the probability of each word among all first tokens; its spellings (" Good", "good") count together.

    A word that is not among the tokens given is less probable than all that are, and counts as zero.

    Args:
        logprobs: Token -> log-probability.
        words: In lower case.
    """
    masses = dict.fromkeys(words, 0.0)
    for token, logprob in logprobs.items():
        word = token.strip(" \t\n▁Ġ").lower()  # the last two: how some servers spell a token's leading space
        if word in masses:
            masses[word] += math.exp(logprob)
    return masses


def shares(masses: Mapping[str, float], logprobs: Mapping[str, float], *, min_mass: float) -> list[float]:
    """Return the probability of each word among these words, from their probabilities among all.

    Args:
        masses: Word -> probability.
        logprobs: First tokens -> log-probability, for the message.
        min_mass: How probable the words must be together for the answer to be one of them.

    Raises:
        UnparsableError: They are less probable than that: the judge is saying something else.
    """
    total = sum(masses.values())
    if total <= 0 or total < min_mass:
        likely = sorted(logprobs, key=lambda token: -logprobs[token])[:3]
        raise UnparsableError(
            f"the judge's first word is none of {', '.join(masses)}: together they have probability {total:.2g}, less "
            f"than {min_mass:g}; the likeliest are {likely}"
        )
    return [mass / total for mass in masses.values()]


def weigh_words(logprobs: Mapping[str, float], words: Sequence[str], *, min_mass: float) -> list[float]:
    """Return the probability of each word among these words, from the log-probabilities of first tokens.

    Raises:
        UnparsableError: As `shares`.
    """
    return shares(word_masses(logprobs, words), logprobs, min_mass=min_mass)
