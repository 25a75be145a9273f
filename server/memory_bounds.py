"""What the front end can hold at most, by its settings: the sum is to be below the host's limit."""

from __future__ import annotations

from engine.admission import default_prefill_limit
from engine.messages import EngineInfo
from engine.model.byte_size import shown_bytes
from server.config import ServerConfig
from server.large_body import SMALL_BODY

_TOKEN = 44  # bytes of a token id in a list, and in the int32 buffer that is sent
_CHARACTER = 5  # bytes of a body's byte: as it came, and as text that may be four bytes wide
_CONNECTION = 128 * 2**10  # socket, parser and task, without header and body


def front_end_bounds(config: ServerConfig, info: EngineInfo) -> dict[str, int]:
    """Bytes by what they are held for; libraries and the interpreter come on top (about 150 MiB).

    Tokens that wait are bounded by admission, those of sequences that run by their slots and pages.
    """
    bodies = max(config.max_held_body_bytes, config.max_body_bytes)
    small = config.max_connections * SMALL_BODY
    waiting = config.max_queued_prefill_tokens or default_prefill_limit(info.max_model_len)
    waiting += config.max_queued_requests * config.max_batch_tokens
    running = config.max_num_seqs * info.max_model_len
    streams = config.max_queued_requests + config.max_num_seqs
    return {
        "connections": config.max_connections * (_CONNECTION + config.max_header_bytes),
        "bodies": (bodies + small) * _CHARACTER,
        "token ids": (waiting + running) * _TOKEN,
        "unread output": streams * config.max_unread_bytes,
    }


def render_bounds(bounds: dict[str, int]) -> str:
    """A line for each, and one for the sum."""
    lines = {**bounds, "together": sum(bounds.values())}
    return "\n".join(f"{name:>16}  {shown_bytes(value)}" for name, value in lines.items())
