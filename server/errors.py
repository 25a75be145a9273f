"""Every error of the HTTP interface, mapped to its answer in one place.

    {"error": {"message", "type", "param", "code"}}

Messages are ours: fixed text and numbers, at most 300 characters, nothing of the input.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import (
    EngineUnavailableError,
    PoisonError,
    QueueFullError,
    QueueFullReason,
    RequestError,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE = 300  # characters
_FULL: dict[QueueFullReason, str] = {
    "queue_full": "too many requests are waiting; try again later",
    "prefill_backlog": "too many prompt tokens are waiting to be computed; try again later",
}


class ApiError(Exception):
    """An answer other than success. `code` is a short word that programs can test."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE]
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def reason(self) -> str:
        """The word for metrics."""
        return self.code or "invalid_request"

    def body(self) -> dict[str, Any]:
        """The envelope."""
        return {
            "error": {
                "message": self.message,
                "type": error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, message, param=param, code=code)


def error_type(status: int) -> str:
    """OpenAI's word for the class of an error."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def to_api_error(error: Exception) -> ApiError:
    """The answer to any exception; what nobody expected becomes a 500 without detail."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, _FULL[error.reason], code=error.reason, headers=_retry(error))
    if isinstance(error, EngineUnavailableError):
        return ApiError(
            503,
            "the engine takes no requests at present",
            code="engine_unavailable",
            headers=_retry(error),
        )
    if isinstance(error, PoisonError):
        return invalid(
            "this request made the engine fail before and is refused for some minutes",
            code="refused_after_failure",
        )
    if isinstance(error, RequestError):
        return invalid("the request cannot be computed by this server", code="not_computable")
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase.lower()
        headers = dict(error.headers or {})
        return ApiError(error.status_code, phrase, code=phrase.replace(" ", "_"), headers=headers)
    return ApiError(500, "internal error", code="internal_error")


async def answer_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application for errors that it knows."""
    if to_api_error(error).code == "internal_error":
        logger.exception("request %s failed", _request_id(request), exc_info=error)
    return await answer_unexpected(request, error)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """The same for all others, which are raised again once answered; the edge logs them."""
    api_error = to_api_error(error)
    if api_error.status >= 500:
        api_error.message = f"{api_error.message} (request {_request_id(request)})"
    return api_error.response()


def _request_id(request: Request) -> str:
    label: str = request.scope.get("state", {}).get("request_id", "-")
    return label


def _retry(error: QueueFullError | EngineUnavailableError) -> dict[str, str]:
    return {"Retry-After": str(error.retry_after)}
