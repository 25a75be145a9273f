"""The life of a stream: keep-alive while the prompt is computed, chunks, usage, errors, [DONE]."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from engine.errors import EngineError
from server.answer import Answer
from server.choice import Choice, Delta
from server.errors import ApiError
from server.event_stream import DONE, comment, event

logger = logging.getLogger(__name__)


class Chunks(Protocol):
    """How one route writes its chunks."""

    def first_chunks(self) -> list[dict[str, Any]]: ...

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None: ...

    def usage_chunk(self) -> dict[str, Any] | None: ...


async def stream_events(
    answer: Answer, chunks: Chunks, keep_alive_seconds: float
) -> AsyncIterator[bytes]:
    """Everything after the headers. Never silent for longer than `keep_alive_seconds`.

    An error becomes an event of its own; `[DONE]` is always last.
    """
    try:
        for first in chunks.first_chunks():
            yield event(first)
        written = time.monotonic()
        yield _progress(answer)
        async for item in answer.deltas(keep_alive_seconds / 2):
            chunk = None if item is None else chunks.chunk(*item)
            if chunk is not None:
                yield event(chunk)
            elif time.monotonic() - written < keep_alive_seconds / 2:
                continue
            else:
                yield _progress(answer)
            written = time.monotonic()
        usage = chunks.usage_chunk()
        if usage is not None:
            yield event(usage)
    except (ApiError, EngineError) as error:
        yield event(answer.failed(error).body())
    except Exception as error:  # the status has left: only an event can still tell the client
        logger.exception("a stream failed")
        answer.close("error")
        yield event(answer.failed(error).body())
    yield DONE


def _progress(answer: Answer) -> bytes:
    if answer.is_paused:
        return comment("paused: the engine is restarting")
    done, wanted = answer.progress()
    return comment(f"prefill {done}/{wanted}" if done < wanted else "decoding")
