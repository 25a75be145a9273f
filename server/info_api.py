"""The small routes: models, tokenize, detokenize, health, metrics, version, OpenAPI."""

from __future__ import annotations

from collections.abc import Sized
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.errors import ApiError
from server.event_stream import answered
from server.metrics_page import MetricsPage
from server.openapi import openapi_document
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.service import Service
from server.validation import encode_prompt, parse_ids

LIVE = "/health/live"
READY = "/health/ready"
METRICS = "/metrics"


def info_router(service: Service) -> APIRouter:
    """The routes, bound to their service."""
    router = APIRouter()
    document = openapi_document()
    page = MetricsPage(service.metrics.registry, service.config.model_name)

    @router.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        if model_id != service.config.model_name:
            raise ApiError(404, "no such model", param="model", code="model_not_found")
        return _json(_model(service))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await service.parse(TokenizeRequest, request)
        info = service.engine.info
        job = service.in_thread(
            *(encode_prompt, body.prompt, service.tokenizer, info, body.add_special_tokens),
            size=len(body.prompt),
        )
        ids = (await answered(job, request)).tolist()
        return _json({"tokens": ids, "count": len(ids), "max_model_len": info.max_model_len})

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await service.parse(DetokenizeRequest, request)
        job = service.in_thread(_decode, service, body.tokens, size=_size(body.tokens))
        return _json({"prompt": await answered(job, request)})

    @router.get(LIVE)
    async def live() -> Response:
        return _json({"status": "alive"})

    @router.get(READY)
    async def ready() -> Response:
        problem = not_ready(service)
        if problem is not None:
            why = {"reason": service.engine.trouble} if service.engine.trouble else {}
            return _json({"status": problem, **why}, 503, {"Retry-After": "5"})
        return _json({"status": "ready"})

    @router.get(METRICS)
    async def metrics(request: Request) -> Response:
        content, kind = await page.render(request.headers.get("accept", ""))
        return Response(content, media_type=kind, headers={"Vary": "Accept"})

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return _json(document)

    @router.get("/version")
    async def show_version() -> Response:
        return _json({"version": version("rtpurbo")})

    return router


def not_ready(service: Service) -> str | None:
    """Why the engine takes no work now, None if it does."""
    if service.engine.state != "ready":
        return service.engine.state
    silent = service.engine.seconds_since_step()
    allowed = service.config.stall_seconds + service.engine.step_seconds()
    return "stalled" if silent > allowed else None


def _decode(service: Service, tokens: Any) -> str:
    return service.tokenizer.decode(parse_ids(tokens, service.engine.info, "tokens"))


def _size(tokens: Any) -> int:
    return len(tokens) if isinstance(tokens, Sized) else 0


def _model(service: Service) -> dict[str, Any]:
    info = service.engine.info
    return {
        "id": service.config.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "rtpurbo",
        "max_model_len": info.max_model_len,
        "attention": info.attention,
        "retrieval_head_share": info.retrieval_heads / info.attention_heads,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "kv_bytes_per_token_dense": info.kv_bytes_per_token_dense,
    }


def _json(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(payload), status, headers, media_type="application/json")
