"""Models that judge images behind an OpenAI-compatible endpoint: asking one, and reading what it answers."""

import base64
import importlib
import io
import json
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from PIL import Image
from pydantic import AfterValidator, Field, JsonValue, SecretStr

from tiltflow.errors import JudgeError, RewardError, UnparsableError
from tiltflow.rewards.loops import LoopClosedError, LoopThread, PerProcess
from tiltflow.rewards.replies import DiskReplies, Replies, Reply, request_key
from tiltflow.rewards.secrets import Secret
from tiltflow.rewards.tries import PASSING, Tries
from tiltflow.types import Config

T = TypeVar("T")
Content = Sequence[Image.Image | str]  # one turn of a conversation

TOP_LOGPROBS: Final = 20  # the most that most endpoints give
NO_KEY: Final = "EMPTY"  # sent to servers that ask for none; the client refuses an empty one
NEVER: Final = -9999.0  # how servers write a log-probability of minus infinity, which JSON cannot
TOKEN_ID: Final = "token_id:"  # how servers write a token whose id was asked for
BROKEN_OFF: Final = ("content_filter", "abort", "error")  # reasons to finish an answer that is none
LABEL_FIELDS: Final = ("logprob_token_ids", "return_tokens_as_token_ids")
TOKENIZE_TIMEOUT: Final = 5.0  # seconds
ROUNDING: Final = 1e-3  # by which a log-probability may be above zero


def _check_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("it must begin with http:// or https://, and usually ends with /v1")
    return text


Url = Annotated[str, AfterValidator(_check_url)]


# The options that may change while the judge stays the same.
RUNNING: Final = ("api_base_url", "max_concurrent", "max_retries", "max_cache_size", "cache_dir", "cache_limit_mib")


class NotOfferedError(JudgeError):
    """The server of a judge does not know a request that not all servers know."""


class EndpointOptions(Config):
    """How to ask a model behind an endpoint: the options of every reward that does."""

    api_key: Secret = Field(default=SecretStr(NO_KEY), min_length=1)  # saved configs show stars in its place
    api_key_env: str | None = None  # the environment variable that holds the key
    max_concurrent: int = Field(default=8, ge=1, le=1000)  # requests at once, of all threads together
    max_retries: int = Field(default=3, ge=0)  # after the first try, with growing pauses, while there is time
    max_cache_size: int = Field(default=1024, ge=0)  # replies that are remembered; 0: none
    cache_dir: str | None = None  # where replies outlive the process; None: nowhere
    cache_limit_mib: float = Field(default=1024.0, gt=0)  # of the files in cache_dir
    extra_body: Mapping[str, JsonValue] = Field(default_factory=dict[str, JsonValue])  # more keys for every request

    def seconds_for(self, count: int, *, timeout: float) -> float:
        """Return how long so many requests take at most, each of them `timeout` seconds from its turn on."""
        return math.ceil(count / self.max_concurrent) * timeout


class JudgeOptions(EndpointOptions):
    """Where a judge answers, in the words of the judge rewards."""

    api_base_url: Url = "http://localhost:8000/v1"
    vlm_model: str = Field(min_length=1)  # as the server calls it


class EndpointSettings(EndpointOptions):
    """Where a judge answers, and how to ask it."""

    base_url: Url  # such as http://localhost:8000/v1
    model: str  # its name there
    timeout: float = Field(default=60.0, gt=0)  # seconds per request, with all its tries and pauses

    @classmethod
    def of(cls, options: EndpointOptions, *, base_url: str, model: str, timeout: float) -> "EndpointSettings":
        """Return the settings that a reward's options make."""
        shared = options.model_dump(include=set(EndpointOptions.model_fields))
        return cls(base_url=base_url, model=model, timeout=timeout, **shared)


class ChatEndpoint:
    """A vision-language model behind an OpenAI-compatible endpoint.

    Any number of threads may ask, also from within a running event loop; together they have `max_concurrent` requests
    on the way over one pool of connections. What fails in passing is tried again (`Tries`), and a request is over
    `timeout` seconds after its turn has come, whatever the server does.
    """

    def __init__(self, settings: EndpointSettings):
        """Prepare a client; nothing is sent yet.

        Raises:
            RewardError: The package openai is not installed, there is no key, or the cache's folder cannot be used.
        """
        self.settings = settings
        self._openai = _openai(settings)
        self._name = f"the judge {settings.model!r} at {settings.base_url}"
        self._line = PerProcess(partial(_Line, self._openai, self._name, settings))

    def close(self) -> None:
        """Close all connections, for good; they also close when nobody has the endpoint any longer."""
        self._line.get().loop.close()

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
            NotOfferedError: The server refuses to tell the tokens that were asked for.
            JudgeError: The endpoint cannot be reached or refuses, its answer has no log-probabilities, or `read`
                raised.
        """
        messages = [_turn("user", content)]
        extra: dict[str, Any] = {}
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        if token_ids:
            extra |= dict(zip(LABEL_FIELDS, (list(token_ids), True), strict=True))
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

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text as the judge's own tokenizer has them: `POST /tokenize` of vLLM.

        Raises:
            NotOfferedError: The server has no such route, or another one by this name.
            JudgeError: It does not answer, within a few seconds and at the first try.
        """
        line = self._line.get()
        url = f"{self.settings.base_url.rstrip('/').removesuffix('/v1')}/tokenize"  # beside /v1, not below it
        body = {"model": self.settings.model, "prompt": text, "add_special_tokens": False}

        def post(limits: Any) -> Awaitable[Any]:
            return line.client.post(url, cast_to=object, body=body, options={"timeout": limits})

        try:
            told = self._run(line, lambda: line.tries.send(post, seconds=TOKENIZE_TIMEOUT, retries=0))
        except JudgeError as error:
            status = self._status(error)
            if status == 501 or (status is not None and status < 500 and status not in PASSING):
                raise NotOfferedError(str(error)) from error
            raise
        ids = told.get("tokens") if isinstance(told, dict) else None
        if not isinstance(ids, list) or not all(isinstance(each, int) and each >= 0 for each in ids):
            raise NotOfferedError(f"{self._name} answered /tokenize with something else than tokens")
        return ids

    def _ask(
        self, messages: Sequence[Any], sampling: Mapping[str, Any], extra: Mapping[str, Any], read: Callable[[Reply], T]
    ) -> T:
        request = {"model": self.settings.model, "messages": messages, **sampling}
        extra = {**extra, **self.settings.extra_body}
        key = request_key({**request, "extra_body": extra})
        line = self._line.get()
        return line.replies.get(key, lambda: self._send(line, request, extra), read)

    def _send(self, line: "_Line", request: Mapping[str, Any], extra: Mapping[str, Any]) -> Reply:
        def create(limits: Any) -> Awaitable[Any]:
            return line.client.chat.completions.create(**request, extra_body=extra or None, timeout=limits)

        try:
            response = self._run(line, lambda: line.tries.send(create))
        except JudgeError as error:
            if self._refuses_labels(error, extra):
                raise NotOfferedError(str(error)) from error
            raise
        if not isinstance(response, self._openai.types.chat.ChatCompletion):
            raise JudgeError(f"{self._name} answered with no chat completion; base_url usually ends with /v1")
        try:
            return _reply(response)
        except (AttributeError, TypeError, ValueError) as error:  # the client believes servers without checking
            raise JudgeError(f"{self._name} answered with a malformed chat completion: {error}") from error

    def _run(self, line: "_Line", work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return line.loop.run(work)
        except LoopClosedError as error:
            raise JudgeError(f"{self._name} is asked no more: {error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # a body that says it is JSON and is none
            raise JudgeError(f"{self._name} answered with no JSON: {error}") from error

    def _refuses_labels(self, error: JudgeError, extra: Mapping[str, Any]) -> bool:
        """Tell whether a request was refused because of the tokens that it asks for, as far as the server says."""
        return self._status(error) in (400, 422) and any(
            field in extra and field in str(error.__cause__) for field in LABEL_FIELDS
        )

    def _status(self, error: JudgeError) -> int | None:
        """Return the HTTP status behind an error, if that is what is behind it."""
        cause: Any = error.__cause__
        return cause.status_code if isinstance(cause, self._openai.APIStatusError) else None

    def _first_tokens(self, reply: Reply) -> Mapping[str, float]:
        self._check_end(reply)
        if not reply.first_tokens:
            raise JudgeError(
                f"{self._name} answered without log-probabilities; use a server and a model that give top_logprobs"
            )
        return reply.first_tokens

    def _check_end(self, reply: Reply) -> None:
        if reply.finish_reason in BROKEN_OFF:
            raise UnparsableError(f"{self._name} broke its answer off (finish_reason={reply.finish_reason!r})")

    def _whole_text(self, reply: Reply, max_tokens: int) -> str:
        self._check_end(reply)
        if not reply.text.strip():
            raise UnparsableError(f"{self._name} gave an empty answer (finish_reason={reply.finish_reason!r})")
        if reply.finish_reason == "length":
            raise UnparsableError(f"{self._name} gave an answer that was cut off; raise max_tokens={max_tokens}")
        return reply.text


class _Line:
    """What one process needs to ask: connections, the loop that they live in, and what was answered."""

    def __init__(self, openai: Any, name: str, settings: EndpointSettings):
        self.client = _client(openai, settings)
        self.loop = LoopThread(f"judge-{settings.model}", at_end=self.client.close)
        self.tries = Tries(
            openai,
            name,
            seconds=settings.timeout,
            retries=settings.max_retries,
            at_once=settings.max_concurrent,
        )
        disk = None
        if settings.cache_dir is not None:
            disk = DiskReplies(Path(settings.cache_dir).expanduser(), limit=settings.cache_limit_mib * 2**20)
        self.replies = Replies(settings.max_cache_size, disk)


def _openai(settings: EndpointSettings) -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise RewardError(
            f"base_url={settings.base_url!r} needs the package openai: pip install 'tiltflow[judge]'"
        ) from error


def _client(openai: Any, settings: EndpointSettings) -> Any:
    key = settings.api_key.get_secret_value()
    if settings.api_key_env is not None:
        if key != NO_KEY:
            raise RewardError(f"api_key and api_key_env={settings.api_key_env!r} are both given; leave one out")
        key = os.environ.get(settings.api_key_env, "")
    if not key:
        raise RewardError(f"api_key_env={settings.api_key_env!r}: this environment variable is not set or empty")
    return openai.AsyncOpenAI(base_url=settings.base_url, api_key=key, max_retries=0)  # `Tries` knows the deadline


def _reply(response: Any) -> Reply:
    if not response.choices:
        return Reply(text="")
    choice = response.choices[0]
    first = None
    if choice.logprobs is not None and choice.logprobs.content:
        first = _by_spelling(choice.logprobs.content[0].top_logprobs or ())
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


def _by_spelling(entries: Sequence[Any]) -> dict[str, float]:
    """Return spelling -> log-probability.

    Tokens may be spelt alike, such as those with and without a leading space where that is lost in writing: their
    probabilities add up. A token that is listed twice counts once.
    """
    found: dict[str, set[float]] = {}
    for entry in entries:
        found.setdefault(entry.token, set()).add(_checked(entry.logprob))
    return {token: next(iter(each)) if len(each) == 1 else _sum(each) for token, each in found.items()}


def _sum(logprobs: Iterable[float]) -> float:
    total = sum(math.exp(logprob) for logprob in logprobs)
    return math.log(total) if total > 0 else NEVER


def _checked(logprob: float) -> float:
    if not logprob <= ROUNDING:  # NaN is not, either
        raise ValueError(f"a log-probability is {'NaN' if math.isnan(logprob) else logprob}")
    return max(logprob, NEVER)
