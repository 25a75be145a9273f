"""Request bodies: strict types, every accepted field honoured, everything else said.

The raw bytes are parsed by pydantic's JSON parser, which refuses NaN, lone surrogates, deep nesting
and trailing bytes before any of our code runs. Fields with several shapes (`prompt`, `stop`, …) are
taken as they come and checked by hand in `server.validation`: a union type would check every branch
and report an error per branch and item.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema

from server.errors import ApiError, invalid
from server.large_body import CutValues, cut_body

INT64 = 2**63

Unit = Annotated[float, Field(gt=0, le=1)]


def _restored(value: Any, info: ValidationInfo) -> Any:
    """What was cut out of a large body before it was parsed (`server.large_body`)."""
    return value if info.context is None else info.context.restore(value)


# Schemas of the fields that are checked by hand, for the OpenAPI document.
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 128},
        _IDS | {"minItems": 1},
        {"type": "array", "items": _IDS | {"minItems": 1}, "minItems": 1, "maxItems": 128},
    ]
}
_STOP = {
    "anyOf": [
        _TEXT | {"maxLength": 256},
        {"type": "array", "items": _TEXT | {"maxLength": 256}, "maxItems": 4},
        {"type": "null"},
    ]
}
_STOP_IDS = {"anyOf": [_IDS | {"maxItems": 128}, {"type": "null"}]}
_BIAS = {
    "type": ["object", "null"],
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "maxProperties": 4096,
}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
    "required": ["role", "content"],
}
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 4096}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, frozen=True)
    include_usage: bool = False


class GenerationFields(BaseModel):
    """What both completion routes share."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**20)] | None = None  # -1 and 0 are off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Any, WithJsonSchema(_STOP)] = None
    stop_token_ids: Annotated[Any, WithJsonSchema(_STOP_IDS)] = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS)] = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=10)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    attention_top_p: Unit | None = None


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions (design section 7)."""

    prompt: Annotated[Any, AfterValidator(_restored), WithJsonSchema(_PROMPT)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[Any, AfterValidator(_restored), WithJsonSchema(_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", protected_namespaces=())
    model: str | None = None
    prompt: Annotated[str, AfterValidator(_restored)]
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", protected_namespaces=())
    model: str | None = None
    tokens: Annotated[Any, AfterValidator(_restored), WithJsonSchema(_IDS)]


# OpenAI fields that are known and do nothing here: null is as good as absent, a value is refused.
UNSUPPORTED: dict[type[BaseModel], frozenset[str]] = {
    CompletionRequest: frozenset(["suffix", "best_of"]),
    ChatCompletionRequest: frozenset(
        """audio function_call functions modalities parallel_tool_calls prediction reasoning_effort
        response_format tool_choice tools verbosity web_search_options""".split()
    ),
}

Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], raw: bytes, cut: CutValues | None = None) -> Body:
    """Validate a JSON body, out of which `cut` was taken.

    Raises:
        ApiError: 400 that names the first field at fault and echoes nothing.
    """
    try:
        body = kind.model_validate_json(raw, context=cut)
    except pydantic.ValidationError as error:
        raise _first_error(error) from None
    if cut is not None:
        cut.check_empty()
    for name in UNSUPPORTED.get(kind, ()):
        if (body.model_extra or {}).get(name) is not None:
            raise invalid("this field is not supported", name, "unsupported_field")
    return body


def parse_large_body(kind: type[Body], raw: bytes) -> Body:
    """The same in a thread, for a body of any size: no step of it takes long.

    Raises:
        ApiError: as above, or 400 for a body of too many values.
    """
    thin, cut = cut_body(raw, kind.model_fields)
    return parse_body(kind, thin, cut)


def unknown_fields(body: BaseModel) -> list[str]:
    """Names of fields that nobody knows; they are ignored and counted."""
    known = UNSUPPORTED.get(type(body), frozenset())
    return [name for name in body.model_extra or {} if name not in known]


def _first_error(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location = first["loc"]
    param = location[0] if location and isinstance(location[0], str) else None
    if first["type"] == "json_invalid":
        return invalid("the body is not valid JSON", code="invalid_json")
    if param is None:
        return invalid("the body must be a JSON object", code="invalid_json")
    message = (
        first["msg"] if first["type"] != "string_pattern_mismatch" else "has control characters"
    )
    return invalid(f"{param}: {message}", param, "invalid_value")
