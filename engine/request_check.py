"""From a message to a request that cannot harm: all that indexes or scales a tensor is bound.

The edge has checked most of it and says which field is wrong. Here it is checked again, because a
request that ends the loop ends it for everybody.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

from engine.errors import RequestError
from engine.messages import Add, EngineInfo
from engine.request import Request, SamplingParams

_LARGEST = 1e6  # of biases and penalties; float32 holds what they make of any logit
_SMALLEST = 1e-6  # of a repetition penalty, which divides


def read_request(message: Add, info: EngineInfo) -> Request:
    """The request of a message.

    Raises:
        RequestError: it cannot be computed; the message tells the field and the bound, no values.
    """
    prompt, output = _tokens(message.prompt), _tokens(message.output)
    params = message.params
    _need(bool(prompt), "the prompt is empty")
    for ids in (prompt, output, params.logit_bias, params.stop_token_ids):
        _check_ids(ids, info.vocab_size)
    _check_lengths(len(prompt), len(output), params, info.max_model_len)
    _check_numbers(params)
    return Request(
        message.request_id,
        prompt,
        params,
        output=output,
        arrival=message.arrival,
        deadline=message.deadline,
    )


def _tokens(buffer: bytes) -> list[int]:
    _need(len(buffer) % 4 == 0, "a token buffer is not a whole number of int32 values")
    values = array("i")
    values.frombytes(buffer)
    return values.tolist()


def _check_ids(ids: Iterable[int], vocab_size: int) -> None:
    inside = all(0 <= token < vocab_size for token in (min(ids, default=0), max(ids, default=0)))
    _need(inside, f"a token id is outside [0, {vocab_size})")


def _check_lengths(prompt: int, output: int, params: SamplingParams, limit: int) -> None:
    _need(params.max_tokens >= 0, "max_tokens must be at least 0")
    room = limit - prompt - output
    _need(room >= (params.max_tokens > 0), f"{limit - room} tokens leave no room to generate")
    _need(output < max(params.max_tokens, 1), "max_tokens were generated already")
    told = (params.logprobs, params.prompt_logprobs)
    _need(all(count is None or count >= 0 for count in told), "logprobs must be at least 0")


def _check_numbers(params: SamplingParams) -> None:
    _need(0 <= params.temperature <= _LARGEST, f"temperature must be in [0, {_LARGEST:g}]")
    _need(0 < params.top_p <= 1, "top_p must be in (0, 1]")
    _need(params.top_k >= 0, "top_k must be at least 0")
    _need(0 <= params.min_p <= 1, "min_p must be in [0, 1]")
    mass = params.attention_top_p
    _need(mass is None or 0 < mass <= 1, "attention_top_p must be in (0, 1]")
    factor = params.repetition_penalty
    _need(
        _SMALLEST <= factor <= _LARGEST,
        f"repetition_penalty must be in [{_SMALLEST:g}, {_LARGEST:g}]",
    )
    added = (params.presence_penalty, params.frequency_penalty, *params.logit_bias.values())
    _need(
        all(math.isfinite(value) and abs(value) <= _LARGEST for value in added),
        f"penalties and biases must be in [-{_LARGEST:g}, {_LARGEST:g}]",
    )


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RequestError(otherwise)
