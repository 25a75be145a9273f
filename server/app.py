"""The application: routes around one service, behind the edge, and the recorder around all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine.client import Engine
from engine.errors import EngineError
from engine.tokenizer import Tokenizer
from server.auth import OPEN_PATHS, KeyRing
from server.chat import chat_router
from server.completions import completions_router
from server.config import ServerConfig
from server.edge import Edge
from server.errors import ApiError, answer_error, answer_unexpected, to_api_error
from server.info_api import LIVE, METRICS, READY, info_router
from server.recorder import Observer, Recorder
from server.request_log import RequestLog
from server.request_record import CLIENT_CLOSED_REQUEST, record_of
from server.service import Service


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    config: ServerConfig,
    dropped_lines: Callable[[], int] = int,
    observers: Sequence[Observer] = (),
) -> Recorder:
    """The ASGI application of one server. The engine is started and stopped by the caller.

    Args:
        dropped_lines: tells how many log lines of this process were lost.
        observers: told of every request that ended, before it is logged.
    """
    service = Service(engine, tokenizer, config, dropped_lines)
    open_paths = OPEN_PATHS | {METRICS} if config.open_metrics else OPEN_PATHS
    keys = KeyRing(config.key_source(), open_paths)
    log = RequestLog(config.model_name, quiet=(LIVE, READY, METRICS))
    return Recorder(
        Edge(create_routes(service), config, keys),
        [service.metrics.observe_request, *observers, log.write],
    )


def create_routes(service: Service) -> FastAPI:
    """The routes without the edge around them."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(completions_router(service))
    app.include_router(chat_router(service))
    app.include_router(info_router(service))

    async def rejected(request: Request, error: Exception) -> Response:
        record_of(request).error_code = to_api_error(error).reason
        return await answer_error(request, error)

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (ApiError, EngineError, HTTPException):
        app.add_exception_handler(kind, rejected)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, answer_unexpected)
    return app
