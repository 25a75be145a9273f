"""The OpenAPI document tells the truth: its routes, and what schemathesis makes of its schemas.

The draws depend on nothing but the code, so a failure here can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.openapi import openapi_document
from server.protocol import ChatCompletionRequest, CompletionRequest
from tests.server.live_server import LiveServer, live_server
from tests.server.test_auth import routes

DOCUMENT = openapi_document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS: dict[tuple[str, str], Any] = {
    (operation.method, operation.path): operation
    for operation in (found.ok() for found in SCHEMA.get_all_operations())  # type: ignore[union-attr]
}
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
GENERATING = ("/v1/completions", "/v1/chat/completions")
MODES = {"good": GenerationMode.POSITIVE, "bad": GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A context of 100 tokens, since a drawn request asks for as much as it may."""
    with live_server(tmp_path_factory.mktemp("small"), keep_alive_seconds=0.1) as server:
        server.engine.info = msgspec.structs.replace(server.engine.info, max_model_len=100)
        yield server


def test_every_route_is_described_and_no_other(tmp_path: Path) -> None:
    served = {(method.lower(), path.replace(":path}", "}")) for method, path in routes(tmp_path)}
    assert served == set(OPERATIONS)


def test_the_document_is_served(small: LiveServer) -> None:
    assert httpx.get(small.url + "/openapi.json").json() == DOCUMENT


def test_every_operation_lists_the_errors_of_the_edge() -> None:
    for (method, path), operation in OPERATIONS.items():
        answers = DOCUMENT["paths"][path][method]["responses"]
        expected = {"200", "400", "401", "405", "408", "414", "431", "500", "503"}
        assert expected <= set(answers), operation
        if method == "post":
            assert {"413", "415"} <= set(answers)


def coupled(body: dict[str, Any]) -> dict[str, Any]:
    """A drawn body with what no schema can say: it has to be answered with 200."""
    left_out = {"logit_bias", "max_completion_tokens"}
    body = {key: whole(value) for key, value in body.items() if key in KNOWN - left_out}
    body |= {"model": "toy", "min_tokens": 0, "max_tokens": 4, "timeout_seconds": 20}
    body["n"] = min(body.get("n") or 1, 4)
    for field in ("prompt", "stop_token_ids"):
        if field in body:
            body[field] = fitting(body[field])
    if "messages" in body:
        body["messages"] = body["messages"][:3]
    for message in body.get("messages", ()):
        message["content"] = "a"
        for calls in ("tool_calls", "function_call"):
            message.pop(calls, None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    return body


def whole(value: Any) -> Any:
    """To a schema 1.0 is an integer; this server wants it written as one."""
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fitting(value: Any) -> Any:
    """Short enough for the context, and of ids that the model has."""
    if isinstance(value, list):
        return [fitting(item) for item in value[:8]]
    if isinstance(value, str):
        return value[:8]
    return value % 320 if isinstance(value, int) else value


KNOWN = CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()
CASES = [
    pytest.param(method, path, mode, id=f"{method} {path} {mode}")
    for method, path in OPERATIONS
    for mode in MODES
    if mode == "good" or method == "post"  # there is nothing to get wrong without a body
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_fuzz_of_the_document(small: LiveServer, method: str, path: str, mode: str) -> None:
    operation = OPERATIONS[method, path]
    examples = 20 if method == "post" else 4
    seen: list[int] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=MODES[mode]))
    def fuzz(case: Any) -> None:
        is_coupled = mode == "good" and path in GENERATING and len(seen) % 2 == 1
        if is_coupled:
            case.body = coupled(case.body)
        response = case.call(base_url=small.url, timeout=30)
        assert response.status_code == 200 or not is_coupled, response.text
        case.validate_response(response, checks=CHECKS)
        seen.append(response.status_code)
        assert response.status_code < 500
        if response.status_code >= 400:
            assert len(response.content) < 1024
            assert len(response.json()["error"]["message"]) <= 300

    fuzz()
    small.until(lambda: not small.engine.live)
    assert small.post(prompt="a", max_tokens=1).status_code == 200
