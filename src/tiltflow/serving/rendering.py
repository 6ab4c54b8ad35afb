"""What is told over HTTP: replies, and errors in their one envelope."""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from tiltflow.serving.wire import JSON, WireError

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dump(content: Any) -> bytes:
    """Return JSON in one line.

    Raises:
        ValueError: A number in it is NaN or infinite: that must never reach a client as anything.
    """
    return _ENCODER.encode(content).encode()


def error_headers(error: WireError) -> dict[str, str]:
    """Return the headers that go with an error."""
    headers: dict[str, str] = {}
    if error.status in (429, 503) and error.retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_ms / 1000)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: WireError, request_id: str, *, more: Mapping[str, Any] | None = None) -> Response:
    """Return an error's response; `more` is told beside the envelope."""
    body = dump({"error": error.body(request_id), **(more or {})})
    return Response(body, error.status, error_headers(error), media_type=JSON)
