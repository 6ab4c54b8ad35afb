"""A judge behind an endpoint whose answers are a function: the real client over a fake transport."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

Answer = Callable[[dict[str, Any]], Any]  # request body -> response body, or (status, response body)


def completion(tokens: dict[str, float] | None) -> dict[str, Any]:
    """Return an answer whose first token has these log-probabilities; None: it has none."""
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in (tokens or {}).items()]
    first = {"token": "x", "logprob": 0.0, "bytes": None, "top_logprobs": entries}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "a-judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": "x"},
                "logprobs": None if tokens is None else {"content": [first]},
            }
        ],
    }


def said(text: str, *, finish_reason: str = "stop") -> dict[str, Any]:
    """Return an answer of this text, without log-probabilities."""
    answer = completion(None)
    answer["choices"][0] |= {"finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return answer


def sent_images(body: dict[str, Any]) -> list[Image.Image]:
    """Return the images of a request."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def sent_image(body: dict[str, Any]) -> Image.Image:
    """Return the only image of a request."""
    (image,) = sent_images(body)
    return image


def serve(monkeypatch: pytest.MonkeyPatch, answer: Answer, *, tokenize: Answer | None = None) -> list[Any]:
    """Let every client made from now on speak to a function, and return the list that its requests will be in.

    Another function answers `/tokenize`; without one the server has no such route, and requests of it are not listed.
    """
    openai = pytest.importorskip("openai")
    httpx = pytest.importorskip("httpx2")
    requests: list[Any] = []

    def handle(request: Any) -> Any:
        body = json.loads(request.content)
        if request.url.path.endswith("/tokenize"):
            if tokenize is None:
                return httpx.Response(404, json={"detail": "Not Found"})
            requests.append(request)
            return httpx.Response(200, json=tokenize(body))
        requests.append(request)
        reply = answer(body)
        status, body = reply if isinstance(reply, tuple) else (200, reply)
        if isinstance(body, str):
            return httpx.Response(status, text=body, headers={"content-type": "text/html"})
        return httpx.Response(status, text=json.dumps(body), headers={"content-type": "application/json"})

    real = openai.AsyncOpenAI

    def client(**settings: Any) -> Any:
        return real(http_client=httpx.AsyncClient(transport=httpx.MockTransport(handle)), **settings)

    monkeypatch.setattr(openai, "AsyncOpenAI", client)
    return requests
