"""The wire format of `POST /v1/score`: messages, their errors and limits, shared by the server and its client.

A request is JSON; pictures travel beside it as tensors of one safetensors body (whose metadata `request` is the JSON),
as the parts of a multipart body, or inside it as base64. Additions within v1 are compatible: a reply's unknown keys are
ignored, a request's unknown keys are errors. Only numpy, safetensors and pydantic are needed here.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tiltflow.errors import TiltflowError

SCORE_PATH: Final = "/v1/score"
MODELS_PATH: Final = "/v1/models"
SAFETENSORS: Final = "application/vnd.rewards.safetensors"
MULTIPART: Final = "multipart/form-data"
JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
REQUEST: Final = "request"  # the name of the JSON in safetensors metadata and in multipart bodies

# What a reward can be given of a sample.
FIELDS: Final = ("prompt", "image", "video", "condition_images", "condition_videos", "metadata")

DEADLINE_HEADER: Final = "X-Request-Timeout-Ms"  # milliseconds that the client will still wait
KEY_HEADER: Final = "Idempotency-Key"
ID_HEADER: Final = "X-Request-Id"

# Values in one JSON text: each costs a parser many times its bytes, and 64 MiB have room for 33 million of them.
JSON_VALUES: Final = 1_000_000

# Levels `[H, W, 3]` uint8, or values in [0, 1] `[3, H, W]` float32; a video has one more axis in front.
Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]

# code -> (HTTP status, worth another try)
CODES: Final[Mapping[str, tuple[int, bool]]] = {
    "invalid_request": (400, False),
    "unauthorized": (401, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "model_not_found": (404, False),
    "method_not_allowed": (405, False),
    "body_timeout": (408, False),  # what was too slow once will be too slow again
    "idempotency_conflict": (409, False),
    "payload_too_large": (413, False),
    "unsupported_media": (415, False),
    "invalid_item": (422, False),
    "image_decode_failed": (422, False),
    "overloaded": (429, True),
    "scorer_error": (500, False),
    "nonfinite_score": (500, False),
    "wrong_count": (500, False),
    "internal_error": (500, True),
    "not_implemented": (501, False),
    "upstream_judge": (502, True),
    "loading": (503, True),
    "draining": (503, True),
    "worker_lost": (503, True),
    "model_failed": (503, False),
    "deadline_exceeded": (504, True),
}


AnyModel = TypeVar("AnyModel", bound=BaseModel)


class WireError(TiltflowError):
    """What went wrong with a request or one of its items, as it is told over the wire."""

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after_ms: int | None = None):
        """Keep what is told.

        Args:
            code: A key of `CODES`.
            message: For people.
            param: The field at fault, such as `items[3].image`.
            retry_after_ms: When another try may succeed, in milliseconds.
        """
        super().__init__(message)
        self.code = code
        self.status, self.retryable = CODES[code]
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """Return the error as it stands in an item, and under `error` in a reply that is nothing else."""
        told = {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "retry_after_ms": self.retry_after_ms,
            "param": self.param,
            "request_id": request_id,
        }
        return {key: value for key, value in told.items() if value is not None}


class Message(BaseModel):
    """Base of what a client sends: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Media(Message):
    """One picture or video: the name of a tensor or part, or an encoded picture in base64."""

    ref: str | None = None
    index: int | None = Field(default=None, ge=0)  # into the first axis of the tensor `ref`
    b64: str | None = None
    format: Literal["png", "jpeg", "webp"] | None = None  # of what `b64` holds; its own first bytes decide

    @model_validator(mode="after")
    def _one_source(self) -> "Media":
        if (self.ref is None) == (self.b64 is None):
            raise ValueError("give either ref or b64")
        if self.index is not None and self.ref is None:
            raise ValueError("index is for ref")
        if self.format is not None and self.b64 is None:
            raise ValueError("format is for b64")
        return self


Video: TypeAlias = Media | list[Media]  # a tensor [T, H, W, 3], or the pictures of its frames


class Item(Message):
    """One sample: what is scored, and what it was made from."""

    id: str = ""  # the client's own name of it, told again in the reply
    prompt: str | None = None  # None: it has none, which is not the empty prompt
    image: Media | None = None
    video: Video | None = None
    condition_images: list[Media] | None = None
    condition_videos: list[Video] | None = None
    group_id: str | None = None  # samples of one id are compared with each other by groupwise models
    meta: dict[str, Any] | None = None  # None: it has none, which is not the empty one


class ScoreRequest(Message):
    """The JSON of `POST /v1/score`."""

    models: list[str] = Field(default_factory=list)  # "name" or "name@revision"; may be empty where there is one model
    items: list[Item]
    params: dict[str, Any] = Field(default_factory=dict)  # must be empty in v1
    partial: Literal["allow", "forbid"] = "allow"  # forbid: one item's error fails the request
    priority: int = 0  # higher goes first
    returns: list[Literal["components"]] = Field(default_factory=list, alias="return")


class Reply(BaseModel):
    """Base of what a server sends: unknown keys are of a later version and ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Finite = Annotated[float, Field(allow_inf_nan=False)]


class ErrorBody(Reply):
    """Why an item or a request has no answer."""

    code: str
    message: str
    retryable: bool = False
    retry_after_ms: int | None = Field(default=None, ge=-(2**53), le=2**53)  # JSON knows larger ones, floats may not
    param: str | None = None
    request_id: str | None = None


class ItemResult(Reply):
    """The answer about one item."""

    index: int  # its place in the request
    id: str = ""
    status: Literal["ok", "error"]
    scores: dict[str, Finite] = Field(default_factory=dict)  # model -> score
    components: dict[str, dict[str, Any]] = Field(default_factory=dict)  # model -> what else it tells
    error: ErrorBody | None = None


class Limits(BaseModel):
    """What a server takes; told in `GET /v1/models/{name}`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    body_bytes: int = 64 * 2**20
    items: int = 256  # per request
    image_pixels: int = 16_800_000
    image_side: int = 8192
    decoded_bytes: int = 512 * 2**20  # per request
    inflight_bytes: int = 2**30  # declared or received bodies of all requests
    queue_items: int = 1024  # per model
    body_seconds: float = 10.0  # to receive a body, or for a client to read a reply, and one more for each MiB
    request_seconds: float = 60.0  # where the client gives no deadline
    longest_request_seconds: float = 600.0
    prompt_bytes: int = 65_536
    json_depth: int = 32
    connections: int = 512

    def seconds_for(self, size: int) -> float:
        """Return how long so many bytes may be on their way."""
        return self.body_seconds + size / 2**20


class ModelInfo(Reply):
    """What `GET /v1/models` tells of one model."""

    name: str
    revision: str = ""
    preproc: str = ""
    dtype: str = ""
    state: str = ""
    groupwise: bool = False  # wants whole groups, each under its group_id
    pixels: Literal["uint8", "float32"] = "uint8"  # what scores exactly as in one process; the other is accepted too
    required_fields: tuple[str, ...] = ()  # of prompt, image, video, condition_images, condition_videos, metadata
    batch_size: int = 1
    # Of one call at most: an item (or a group of a groupwise model) that has more is refused. None: not told.
    batch_pixels: int | None = None
    batch_tokens: int | None = None  # likewise, at four bytes of a prompt each
    limits: Limits = Limits()


@dataclass(frozen=True)
class ScoreReply:
    """All answers of one request, in the order of its items."""

    results: Sequence[ItemResult]
    models: Sequence[ModelInfo]


def read_request(text: bytes | str) -> ScoreRequest:
    """Parse the JSON of a request.

    Raises:
        WireError: It is no such JSON; `param` names the field.
    """
    return read_json(text, ScoreRequest)


def read_json(text: bytes | str, schema: type[AnyModel]) -> AnyModel:
    """Parse JSON of a schema.

    Raises:
        WireError: It is no such JSON; `param` names the field.
    """
    _check_values(text.encode() if isinstance(text, str) else text)
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        message = f"{param or 'the request'}: {problem['msg']}"
        raise WireError("invalid_request", message, param=param or None) from error


def pack_safetensors(request: ScoreRequest, tensors: Mapping[str, Pixels]) -> bytes:
    """Return a request and its pictures as one safetensors body."""
    text = request.model_dump_json(by_alias=True, exclude_defaults=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(contiguous, metadata={REQUEST: text})


def unpack_safetensors(body: bytes) -> tuple[ScoreRequest, dict[str, Pixels]]:
    """Read a safetensors body.

    Returns:
        The request, and its tensors: uint8 or float32, none of them empty, of three axes or more.

    Raises:
        WireError: It is malformed, holds no request, or a tensor is of another dtype or has no pixels.
    """
    try:
        (length,) = struct.unpack_from("<Q", body)
        header = body[8 : 8 + length]
        _check_values(header)
        tensors = safetensors.numpy.load(body)
        text = json.loads(header).get("__metadata__", {}).get(REQUEST)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
        raise WireError("invalid_item", f"the body is no safetensors file: {error}", param="body") from error
    if not isinstance(text, str):
        raise WireError("invalid_request", f"the safetensors metadata has no {REQUEST!r}", param=REQUEST)
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.uint8, np.float32):
            raise WireError("invalid_item", f"{name}: dtype {tensor.dtype}; send uint8 or float32", param=name)
        if tensor.size == 0 or tensor.ndim < 3:
            raise WireError("invalid_item", f"{name}: shape {list(tensor.shape)} has no pixels", param=name)
    return read_request(text), tensors


def read_reply(body: bytes | str, *, items: int) -> ScoreReply:
    """Parse and check a reply.

    Args:
        body: JSON of a `score.result`.
        items: How many were sent.

    Raises:
        ValueError: It is no such JSON, or does not answer every item exactly once, or an answer is neither a score nor
            an error.
    """
    content = json.loads(body, parse_constant=_no_constant)
    if not isinstance(content, dict) or not isinstance(content.get("results"), list):
        raise ValueError("the reply has no results")
    results = [ItemResult.model_validate(result) for result in content["results"]]
    models = [ModelInfo.model_validate(model) for model in content.get("models", [])]
    return ScoreReply(in_order(results, items=items), models)


def read_models(body: bytes | str) -> list[ModelInfo]:
    """Parse the reply to `GET /v1/models`: `{"object": "list", "data": [ModelInfo, ...]}`.

    Raises:
        ValueError: It is no such JSON.
    """
    content = json.loads(body, parse_constant=_no_constant)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError("the reply lists no models")
    return [ModelInfo.model_validate(model) for model in content["data"]]


def in_order(results: Sequence[ItemResult], *, items: int) -> list[ItemResult]:
    """Return results in the order of the items.

    Raises:
        ValueError: An item has no answer or two, or an answer is neither a score nor an error.
    """
    ordered = sorted(results, key=lambda result: result.index)
    if [result.index for result in ordered] != list(range(items)):
        raise ValueError(f"the reply answers items {[result.index for result in ordered]}; {items} were sent")
    for result in ordered:
        if (result.status == "ok") == (result.error is not None):
            raise ValueError(f"the answer about item {result.index} is {result.status!r} and contradicts itself")
    return ordered


def _check_values(text: bytes) -> None:
    if sum(map(text.count, (b",", b"{", b"["))) > JSON_VALUES:
        raise WireError("invalid_request", f"the JSON has more than {JSON_VALUES} values", param=REQUEST)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
