"""Log-probabilities in OpenAI's two shapes: parallel arrays for completions, objects for chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer

FLOOR = -9999.0  # JSON has no -infinity


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One token of a choice: where its text begins, and what the model thought of it.

    `logprobs` is None for the first token of a prompt, which nothing predicts.
    """

    token_id: int
    offset: int  # characters
    logprobs: TokenLogprobs | None


def completion_logprobs(
    entries: Sequence[LogprobEntry], tokenizer: Tokenizer, alternatives: int
) -> dict[str, Any]:
    """The `logprobs` object of a completion choice; without alternatives no top_logprobs."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        found = entry.logprobs
        tops.append(None if found is None else _top(found, tokenizer, alternatives))
    return {
        "tokens": [token_text(tokenizer, entry.token_id) for entry in entries],
        "token_logprobs": [
            None if entry.logprobs is None else floor(entry.logprobs.logprob) for entry in entries
        ],
        "top_logprobs": tops if alternatives else None,
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(
    entries: Sequence[LogprobEntry], tokenizer: Tokenizer, alternatives: int
) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = []
    for entry in entries:
        assert entry.logprobs is not None, "chat has no echo"
        found = entry.logprobs
        pairs = list(zip(found.top_ids, found.top_logprobs, strict=True))[:alternatives]
        content.append(
            {
                **_chat_token(tokenizer, entry.token_id, found.logprob),
                "top_logprobs": [_chat_token(tokenizer, *pair) for pair in pairs],
            }
        )
    return {"content": content, "refusal": None}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Text of one token alone; bytes that are no character are written `bytes:\\xe2\\x80`."""
    if tokenizer.is_byte_level:
        raw = tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return tokenizer.decode([token_id])


def floor(logprob: float) -> float:
    """A logprob that JSON can carry."""
    return logprob if logprob >= FLOOR else FLOOR  # also catches NaN and -infinity


def _top(found: TokenLogprobs, tokenizer: Tokenizer, alternatives: int) -> dict[str, float]:
    """The alternatives and the token itself, by text."""
    pairs = zip(found.top_ids[:alternatives], found.top_logprobs, strict=False)
    top = {token_text(tokenizer, token_id): floor(logprob) for token_id, logprob in pairs}
    top.setdefault(token_text(tokenizer, found.token_id), floor(found.logprob))
    return top


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token_id)
    raw = tokenizer.token_bytes(token_id) if tokenizer.is_byte_level else text.encode()
    return {"token": text, "logprob": floor(logprob), "bytes": list(raw)}
