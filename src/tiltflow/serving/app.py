"""The HTTP application: its routes, and what becomes of errors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tiltflow import __version__
from tiltflow.serving.adapters import Adapters, ComputeBody, GetRewardBody
from tiltflow.serving.guard import ClientGone, Guard
from tiltflow.serving.models import ServedModel
from tiltflow.serving.prometheus import HttpMetrics, make_metrics
from tiltflow.serving.rendering import dump, error_response
from tiltflow.serving.service import Service
from tiltflow.serving.wire import JSON, SCORE_PATH, Limits, ScoreRequest, WireError

CLIENT_GONE: Final = 499  # told to nobody, but counted
RETRY_MS: Final = 1000
_STATUS_CODES: Final[Mapping[int, str]] = {404: "not_found", 405: "method_not_allowed"}

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def create_app(
    models: Mapping[str, ServedModel],
    *,
    limits: Limits,
    token: str | None = None,
    metrics: HttpMetrics | None = None,
    drain_seconds: float = 30.0,
    loaded: Callable[[Mapping[str, WireError | None]], Awaitable[None]] | None = None,
) -> ASGIApp:
    """Return the application for any ASGI server that runs its lifespan events.

    Args:
        models: By name; started and stopped by the application.
        limits: Of requests; told in `/v1/models`.
        token: What every request but a probe must bear; None asks for none.
        metrics: Told of every request; the same that the models tell.
        drain_seconds: For the models to finish what they have when the application stops.
        loaded: Called once, when every model is ready (None) or has failed (why).
    """
    counted = metrics or make_metrics()
    service = Service(models, limits=limits, metrics=counted)
    app = FastAPI(
        title="tiltflow reward server",
        version=__version__,
        docs_url=None,  # that page loads its scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(service, drain_seconds, loaded),
    )
    _add_routes(app, service)
    _add_errors(app)
    return Guard(app, limits=limits, token=token, metrics=counted)


def _lifespan(
    service: Service, drain_seconds: float, loaded: Callable[[Mapping[str, WireError | None]], Awaitable[None]] | None
) -> Lifespan:
    async def tell() -> None:
        found = await asyncio.gather(*(_failure(model) for model in service.models.values()))
        if loaded is not None:
            await loaded(dict(zip(service.models, found, strict=True)))

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        for model in service.models.values():
            await model.start()
        telling = asyncio.ensure_future(tell())
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.gather(*(model.stop(drain_seconds=drain_seconds) for model in service.models.values()))
            service.close()

    return lifespan


async def _failure(model: ServedModel) -> WireError | None:
    try:
        await model.wait_ready()
    except WireError as error:
        return error
    return None


def _add_routes(app: FastAPI, service: Service) -> None:
    probes = _Probes(service)
    adapters = Adapters(service)
    scoring = (
        (SCORE_PATH, service.score, ScoreRequest, "Score items"),
        ("/compute", adapters.compute, ComputeBody, "Score lists of prompts and pictures"),
        ("/get_reward", adapters.get_reward, GetRewardBody, "Score texts"),
    )
    for path, route, _, _ in scoring:  # the first routes are found first, and plain ones cost the least
        app.add_route(path, route, methods=["POST"])
    for path, probe, summary in (
        ("/livez", probes.live, "Is the process alive?"),
        ("/readyz", probes.ready, "Are all models ready?"),
        ("/health", probes.ready, "The same, for other projects' clients"),
        ("/v1/models", probes.models, "All models and the limits"),
        ("/v1/models/{name}", probes.model, "One model"),
        ("/v1/models/{name}/ready", probes.model_ready, "Is it ready?"),
        ("/metrics", probes.metrics, "Numbers for Prometheus"),
    ):
        app.add_api_route(path, probe, methods=["GET"], summary=summary)
    for path, route, schema, summary in scoring:  # for /openapi.json alone: requests end at the plain ones
        app.add_api_route(path, route, methods=["POST"], summary=summary, openapi_extra=_body_of(schema))


def _body_of(schema: Any) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema.model_json_schema()}}}}


def _add_errors(app: FastAPI) -> None:
    async def wire_error(request: Request, error: Any) -> Response:
        return error_response(error, request.state.request_id)

    async def http_error(request: Request, error: Any) -> Response:
        code = _STATUS_CODES.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(WireError(code, message), request.state.request_id)

    async def client_gone(request: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def mistake(request: Request, error: Any) -> Response:  # the server logs it, with where it happened
        return error_response(WireError("internal_error", "the server made a mistake"), request.state.request_id)

    app.add_exception_handler(WireError, wire_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(Exception, mistake)


@dataclass(frozen=True)
class _Probes:
    """The routes that only tell something."""

    service: Service

    async def live(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        return self._readiness(self.service.models, request)

    async def models(self, request: Request) -> Response:
        told = [self._info(model) for model in self.service.models.values()]
        return _json({"object": "list", "data": told})

    async def model(self, request: Request) -> Response:
        return _json(self._info(self._find(request)))

    async def model_ready(self, request: Request) -> Response:
        model = self._find(request)
        return self._readiness({model.name: model}, request)

    async def metrics(self, request: Request) -> Response:
        text, content_type = self.service.metrics.text()
        return Response(text, headers={"Content-Type": content_type})

    def _find(self, request: Request) -> ServedModel:
        name = request.path_params["name"]
        if name not in self.service.models:
            message = f"there is no model {name!r}; this server has {', '.join(self.service.models)}"
            raise WireError("model_not_found", message)
        return self.service.models[name]

    def _info(self, model: ServedModel) -> dict[str, Any]:
        queue = {"queue_items": model.queue_items, "queue_bytes": model.queue_bytes}
        return {**model.info.model_dump(mode="json"), "state": model.state, **queue}

    def _readiness(self, models: Mapping[str, ServedModel], request: Request) -> Response:
        states = {name: model.state for name, model in models.items()}
        if all(state == "READY" for state in states.values()):
            return _json({"status": "ok", "models": states})
        code = next(code for state, code in _WORST if state in states.values())
        message = ", ".join(f"{name} is {state}" for name, state in states.items())
        error = WireError(code, message, retry_after_ms=None if code == "model_failed" else RETRY_MS)
        return error_response(error, request.state.request_id, more={"status": "unready", "models": states})


_WORST: Final = (("FAILED", "model_failed"), ("DRAINING", "draining"), ("LOADING", "loading"))


def _json(content: Any) -> Response:
    return Response(dump(content), media_type=JSON)
