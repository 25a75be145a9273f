"""From a parsed body to what the engine computes: bounds that depend on the model, and prompts."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.messages import EngineInfo
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer
from server.errors import ApiError, invalid
from server.protocol import GenerationFields

DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 4096
MAX_STOP_IDS = 128

Prompt = str | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """Parameters of one request that do not depend on which prompt or choice it is."""

    params: SamplingParams
    stops: tuple[str, ...]


def parse_prompts(value: Any, limit: int) -> list[Prompt]:
    """The four shapes of `prompt`: text, texts, ids, lists of ids. `encode_prompt` checks the ids.

    Raises:
        ApiError: 400 naming `prompt`; empty, mixed or too many.
    """
    if isinstance(value, str | array):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value:
        prompts = [value] if type(value[0]) is int else value
    else:
        raise invalid(
            "prompt must be a text, a list of texts, or token ids, and not empty", "prompt"
        )
    if len(prompts) > limit:
        raise invalid(f"prompt: at most {limit} prompts in one call", "prompt", "too_many_prompts")
    kind = str if isinstance(prompts[0], str) else (list, array)
    if not all(isinstance(prompt, kind) and prompt for prompt in prompts):
        raise invalid("prompt must hold texts only or token ids only, none empty", "prompt")
    return prompts


def check_length(prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo) -> None:
    """Refuse what is too long whatever its tokens are, before room is asked for it.

    Raises:
        ApiError: 400 `context_length_exceeded`.
    """
    if not isinstance(prompt, str):
        if len(prompt) > info.max_model_len:
            raise _too_long(str(len(prompt)), info.max_model_len)
    elif len(prompt) > info.max_model_len * tokenizer.longest_token_bytes:
        raise _too_long(f"more than {info.max_model_len}", info.max_model_len)


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo, add_special_tokens: bool = True
) -> array[int]:
    """Token ids of a prompt; runs in a worker thread, since a long text takes seconds.

    Raises:
        ApiError: 400; `context_length_exceeded` before tokenising where the length alone says so.
    """
    if not isinstance(prompt, str):
        return parse_ids(prompt, info, "prompt")
    size = len(prompt.encode())
    if size > info.max_model_len * tokenizer.longest_token_bytes:
        raise _too_long(f"more than {info.max_model_len}", info.max_model_len)
    count, ids = tokenizer.encode_at_most(
        info.max_model_len, prompt, add_special_tokens=add_special_tokens
    )
    if count > info.max_model_len:
        raise _too_long(str(count), info.max_model_len)
    if not ids:
        raise invalid("prompt has no tokens", "prompt")
    if max(ids) >= info.vocab_size:
        raise invalid("prompt holds a token that the model does not know", "prompt")
    return array("i", ids)


def parse_ids(ids: Any, info: EngineInfo, param: str) -> array[int]:
    """Token ids as they came, checked; not more than the context has room for.

    Raises:
        ApiError: 400 naming `param`.
    """
    if not isinstance(ids, list | array):
        raise invalid(f"{param} must be a list of token ids", param)
    if len(ids) > info.max_model_len:
        raise _too_long(str(len(ids)), info.max_model_len, param)
    _check_ids(ids, info.vocab_size, param)
    return array("i", ids)


def clamp_max_tokens(prompt_tokens: int, wanted: int, info: EngineInfo) -> int:
    """Tokens that can be generated after the prompt, at most `wanted`.

    Raises:
        ApiError: 400 `context_length_exceeded` if there is room for none.
    """
    room = info.max_model_len - prompt_tokens
    if room < (1 if wanted else 0):
        raise _too_long(str(prompt_tokens), info.max_model_len)
    return min(wanted, room)


def parse_sampling(
    body: GenerationFields,
    info: EngineInfo,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingChoice:
    """Everything that shapes sampling, checked against the model.

    Raises:
        ApiError: 400 that names the field.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream", "stream_options")
    min_tokens = _or(body.min_tokens, 0)
    if min_tokens > max_tokens:
        raise invalid("min_tokens must be at most max_tokens", "min_tokens")
    stop_ids = _parse_stop_ids(body.stop_token_ids, info.vocab_size)
    seed = body.seed if body.seed is not None else random.getrandbits(63)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=float(_or(body.temperature, 1.0)),
        top_p=float(_or(body.top_p, 1.0)),
        top_k=min(max(_or(body.top_k, 0), 0), info.vocab_size),
        min_p=float(_or(body.min_p, 0.0)),
        presence_penalty=float(_or(body.presence_penalty, 0.0)),
        frequency_penalty=float(_or(body.frequency_penalty, 0.0)),
        repetition_penalty=float(_or(body.repetition_penalty, 1.0)),
        logit_bias=_parse_bias(body.logit_bias, info.vocab_size),
        seed=seed,
        stop_token_ids=stop_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        attention_top_p=body.attention_top_p,
    )
    return SamplingChoice(params, parse_stops(body.stop))


def parse_stops(value: Any) -> tuple[str, ...]:
    """`stop`: null, a string, or up to four; each of 1 to 256 characters."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise invalid(f"stop must be a string or at most {MAX_STOPS} strings", "stop")
    if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise invalid(f"stop: strings of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(dict.fromkeys(stops))


def _parse_stop_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """`stop_token_ids`: null or up to 128 token ids."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOP_IDS:
        raise invalid(f"stop_token_ids: at most {MAX_STOP_IDS} token ids", "stop_token_ids")
    _check_ids(value, vocab_size, "stop_token_ids")
    return tuple(dict.fromkeys(value))


def _parse_bias(value: Any, vocab_size: int) -> dict[int, float]:
    """`logit_bias`: token id, written as a string as JSON must, to a bias in [-100, 100]."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise invalid(f"logit_bias must be an object of at most {MAX_BIASES} tokens", "logit_bias")
    biases = {}
    for key, bias in value.items():
        # isdecimal alone takes digits of other scripts; the length bound keeps int() cheap.
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not 0 <= token_id < vocab_size:
            raise invalid(f"logit_bias: keys are token ids below {vocab_size}", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise invalid("logit_bias: values are numbers from -100 to 100", "logit_bias")
        biases[token_id] = float(bias)
    return biases


def _check_ids(ids: Sequence[Any], vocab_size: int, param: str) -> None:
    """Refuse anything that is not a token id; `type` because true is an int to Python."""
    for token_id in ids:  # a loop, where min() and max() would hold the interpreter
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise invalid(f"{param}: token ids are whole numbers below {vocab_size}", param)


def _too_long(count: str, limit: int, param: str = "prompt") -> ApiError:
    return invalid(
        f"the prompt has {count} tokens and at least one is to be generated, but the context of "
        f"this model is {limit} tokens",
        param,
        "context_length_exceeded",
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
