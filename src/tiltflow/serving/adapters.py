"""Routes that speak other projects' protocols: `POST /compute` and `POST /get_reward`.

Their clients know scores or failure and nothing in between, so one failed item fails the request.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from tiltflow.serving.guard import read_body
from tiltflow.serving.rendering import dump, error_headers
from tiltflow.serving.requests import Parsed
from tiltflow.serving.service import Service
from tiltflow.serving.wire import JSON, Item, Media, ScoreRequest, Video, WireError, read_json

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+;base64,")
_GROUP: Final = "request"  # all samples of one request belong together


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ComputeBody(_Body):
    """What Flow-Factory's clients send: lists of B entries, pictures in base64."""

    prompt: list[str]
    image: list[str] | None = None
    video: list[list[str]] | None = None
    condition_images: list[list[str]] | None = None
    condition_videos: list[list[list[str]]] | None = None
    metadata: list[dict[str, Any]] | None = None


class GetRewardBody(_Body):
    """What OpenRLHF's clients send: lists of B texts."""

    query: list[str]  # prompt and answer in one text: what is scored
    prompts: list[str] | None = None
    labels: list[Any] | None = None


class Adapters:
    """The routes."""

    def __init__(self, service: Service):
        """Take what scores."""
        self._service = service

    async def compute(self, request: Request) -> Response:
        """Answer `POST /compute` with `{"rewards": [...]}`; a groupwise model takes the request as one group."""
        try:
            rewards = await self._rewards(request, ComputeBody, _compute_items)
        except WireError as error:
            return _failure(error, request)
        return Response(dump({"rewards": rewards}), media_type=JSON)

    async def get_reward(self, request: Request) -> Response:
        """Answer `POST /get_reward` with `{"rewards": [...], "scores": [...], "extra_logs": {}}`."""
        try:
            rewards = await self._rewards(request, GetRewardBody, _text_items)
        except WireError as error:
            return _failure(error, request)
        return Response(dump({"rewards": rewards, "scores": rewards, "extra_logs": {}}), media_type=JSON)

    async def _items(self, request: Request, schema: type[_Body], itemise: Callable[[Any], list[Item]]) -> list[Item]:
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind != JSON:
            raise WireError("unsupported_media", f"Content-Type is {kind!r}; send {JSON}", param="Content-Type")
        body = await read_body(request.receive)
        return await self._service.reader.parse(len(body), lambda: itemise(read_json(body, schema)))

    async def _rewards(
        self, request: Request, schema: type[_Body], itemise: Callable[[Any], list[Item]]
    ) -> list[float]:
        context = self._service.context(request)
        items = await self._items(request, schema, itemise)
        name = request.query_params.get("model")
        if name is None and len(self._service.models) > 1:
            names = ", ".join(self._service.models)
            raise WireError("invalid_request", f"add ?model= to the address: one of {names}", param="model")
        scored = ScoreRequest(models=[name] if name else [], items=items, partial="forbid")
        admit = partial(self._service.admit, context)
        parsed: Parsed = await self._service.reader.samples(scored, {}, admit=admit, hold=context.hold)
        outcome = await self._service.scored(request, context, parsed)
        if outcome.error is not None:
            raise outcome.error
        model = str(outcome.models[0]["name"])
        return [result["scores"][model] for result in outcome.results]


def _compute_items(body: ComputeBody) -> list[Item]:
    columns: Mapping[str, Sequence[Any] | None] = {
        "image": body.image,
        "video": body.video,
        "condition_images": body.condition_images,
        "condition_videos": body.condition_videos,
        "metadata": body.metadata,
    }
    for name, column in columns.items():
        _check_count(name, column, len(body.prompt), "prompts")
    return [
        Item(
            prompt=prompt,
            image=None if body.image is None else _media(body.image[index]),
            video=None if body.video is None else _video(body.video[index]),
            condition_images=None
            if body.condition_images is None
            else [_media(picture) for picture in body.condition_images[index]],
            condition_videos=None
            if body.condition_videos is None
            else [_video(video) for video in body.condition_videos[index]],
            meta=None if body.metadata is None else body.metadata[index],
            group_id=_GROUP,
        )
        for index, prompt in enumerate(body.prompt)
    ]


def _text_items(body: GetRewardBody) -> list[Item]:
    """Return an item per text; what else came with it is its `meta`: `prompt` and `label`."""
    _check_count("prompts", body.prompts, len(body.query), "queries")
    _check_count("labels", body.labels, len(body.query), "queries")
    items: list[Item] = []
    for index, query in enumerate(body.query):
        meta: dict[str, Any] = {}
        if body.prompts is not None:
            meta["prompt"] = body.prompts[index]
        if body.labels is not None:
            meta["label"] = body.labels[index]
        items.append(Item(prompt=query, meta=meta or None, group_id=_GROUP))
    return items


def _check_count(name: str, column: Sequence[Any] | None, count: int, of: str) -> None:
    if column is not None and len(column) != count:
        raise WireError("invalid_item", f"{name} has {len(column)} entries for {count} {of}", param=name)


def _media(text: str) -> Media:
    found = _DATA_URL.match(text)
    return Media(b64=text[found.end() :] if found else text)


def _video(frames: Sequence[str]) -> Video:
    return [_media(frame) for frame in frames]


def _failure(error: WireError, request: Request) -> Response:
    """Return an error as these clients read it: `detail` is text; `error` is this server's own envelope."""
    body = dump({"error": error.body(request.state.request_id), "detail": error.message})
    return Response(body, error.status, error_headers(error), media_type=JSON)
