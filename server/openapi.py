"""The OpenAPI document of this server: `/openapi.json`, or `python -m server.openapi`.

Bodies come from the models that parse them, so the document cannot drift from what is accepted;
statuses are those that the error tests see. FastAPI's own document would know neither, because the
routes take raw requests.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

Json = dict[str, Any]

_REFERENCE = "#/components/schemas/{model}"
_ALWAYS = {  # of every route, from the edge
    400: "the request is invalid",
    401: "no valid API key",
    405: "another method is needed",
    408: "the request did not arrive in time, or its deadline has passed",
    414: "the request target is too long",
    431: "the header fields are too many or too large",
    500: "a fault of the server; the message holds the request's id",
    503: "the engine takes no work now, or there are too many connections",
}
_WITH_BODY = {413: "the body is too large", 415: "not JSON, or encoded"}
_QUEUED = {429: "the queue is full"}
_UNKNOWN = {404: "no such model"}
_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
_RETRIED = (429, 503)


def openapi_document() -> Json:
    """The document, of OpenAPI 3.1."""
    completion, chat = _streamed("Completion"), _streamed("ChatCompletion")
    generated = _UNKNOWN | _QUEUED
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rtpurbo",
            "version": version("rtpurbo"),
            "description": "Completions of a sparse language model, compatible with OpenAI's API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}],
        "paths": {
            "/v1/completions": _post(CompletionRequest, "complete", completion, generated),
            "/v1/chat/completions": _post(ChatCompletionRequest, "chat", chat, generated),
            "/tokenize": _post(TokenizeRequest, "tokenize", _json("Tokens"), _UNKNOWN),
            "/detokenize": _post(DetokenizeRequest, "detokenize", _json("Text"), _UNKNOWN),
            "/v1/models": _get("listModels", _json("ModelList")),
            "/v1/models/{model_id}": _get("getModel", _json("Model"), _UNKNOWN, [_MODEL_ID]),
            "/health/live": _get("live", _json("Health"), is_open=True),
            "/health/ready": _get("ready", _json("Health"), is_open=True),
            "/metrics": _get("metrics", _METRICS),
            "/version": _get("version", _json("Version")),
            "/openapi.json": _get("openapi", {"application/json": {"schema": {"type": "object"}}}),
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": _request_schemas() | _ANSWERS,
        },
    }


def _request_schemas() -> Json:
    kinds = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCE)
    schemas: Json = found["$defs"]
    return schemas


def _post(kind: type[Any], name: str, content: Json, errors: dict[int, str]) -> Json:
    body = {"application/json": {"schema": _ref(kind.__name__)}}
    operation = {
        "operationId": name,
        "requestBody": {"required": True, "content": body},
        "responses": _responses(content, _WITH_BODY | errors),
    }
    return {"post": operation}


def _get(
    name: str,
    content: Json,
    errors: dict[int, str] | None = None,
    parameters: list[Json] | None = None,
    is_open: bool = False,
) -> Json:
    operation: Json = {"operationId": name, "responses": _responses(content, errors or {})}
    if parameters:
        operation["parameters"] = parameters
    if is_open:
        operation["security"] = []
        # Not an error: the probe's own answer.
        operation["responses"]["503"]["content"] = content
    return {"get": operation}


def _responses(content: Json, errors: dict[int, str]) -> Json:
    answers: Json = {"200": {"description": "the answer", "content": content}}
    for status, description in sorted((_ALWAYS | errors).items()):
        answer: Json = {"description": description, "content": _json("Error")}
        if status in _RETRIED:
            answer["headers"] = _RETRY
        answers[str(status)] = answer
    return answers


def _json(name: str) -> Json:
    return {"application/json": {"schema": _ref(name)}}


def _streamed(name: str) -> Json:
    """An answer that is a stream of events if the request asks for it."""
    return _json(name) | {"text/event-stream": {}}


def _ref(name: str) -> Json:
    return {"$ref": _REFERENCE.format(model=name)}


def _object(**properties: Json) -> Json:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _nullable(kind: str) -> Json:
    return {"type": [kind, "null"]}


_TEXT: Json = {"type": "string"}
_WHOLE: Json = {"type": "integer", "minimum": 0}
_ANY_OBJECT: Json = {"type": ["object", "null"]}
_FINISH: Json = {"enum": ["stop", "length"]}
_METRICS = {
    "text/plain": {"schema": _TEXT},
    "application/openmetrics-text": {"schema": _TEXT},
}
_MODEL_ID = {"name": "model_id", "in": "path", "required": True, "schema": _TEXT}
_SECONDS = (
    "queue_seconds prefill_seconds decode_seconds time_to_first_token_seconds "
    "attended_tokens_mean attended_fraction"
).split()
_CHOICE: dict[str, Json] = {"index": _WHOLE, "logprobs": _ANY_OBJECT, "finish_reason": _FINISH}


def _completion(kind: str, **choice: Json) -> Json:
    return _object(
        id=_TEXT,
        object={"const": kind},
        created=_WHOLE,
        model=_TEXT,
        choices=_array(_object(**_CHOICE, **choice)),
        usage=_ref("Usage"),
        metrics=_ref("Metrics"),
    )


_ANSWERS: Json = {
    "Error": _object(
        error=_object(
            message={"type": "string", "maxLength": 300},
            type={
                "enum": [
                    "invalid_request_error",
                    "authentication_error",
                    "rate_limit_error",
                    "server_error",
                ]
            },
            param=_nullable("string"),
            code=_nullable("string"),
        )
    ),
    "Usage": _object(
        prompt_tokens=_WHOLE,
        completion_tokens=_WHOLE,
        total_tokens=_WHOLE,
        prompt_tokens_details=_object(cached_tokens=_WHOLE),
    ),
    "Metrics": _object(**{name: _nullable("number") for name in _SECONDS}),
    "Completion": _completion("text_completion", text=_TEXT),
    "ChatCompletion": _completion(
        "chat.completion", message=_object(role={"const": "assistant"}, content=_TEXT)
    ),
    "Tokens": _object(tokens=_array(_WHOLE), count=_WHOLE, max_model_len=_WHOLE),
    "Text": _object(prompt=_TEXT),
    "Model": _object(
        id=_TEXT,
        object={"const": "model"},
        created=_WHOLE,
        owned_by=_TEXT,
        max_model_len=_WHOLE,
        attention={"enum": ["sparse", "dense"]},
        retrieval_head_share={"type": "number"},
        kv_bytes_per_token={"type": "number"},
        kv_bytes_per_token_dense={"type": "number"},
    ),
    "ModelList": _object(object={"const": "list"}, data=_array(_ref("Model"))),
    "Health": _object(status=_TEXT),
    "Version": _object(version=_TEXT),
}


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(openapi_document())).decode())
