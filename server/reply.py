"""The reply to an admitted call: one JSON answer, or a stream of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.answer import Answer
from server.event_stream import EventStream, answered
from server.logprobs import LogprobEntry
from server.streaming import Chunks, stream_events


class Call(Chunks, Protocol):
    """How one route words its answer, whole or in chunks."""

    @property
    def answer(self) -> Answer: ...

    def whole(
        self, texts: Sequence[str], entries: Sequence[list[LogprobEntry]]
    ) -> dict[str, Any]: ...


async def reply(
    call: Call, request: Request, keep_alive_seconds: float, *, streamed: bool
) -> Response:
    """Headers at once and chunks as they come, or everything when it is there.

    Raises:
        ApiError: 408 at the deadline, 500 for a request that failed alone; not of a stream, which
            tells them in an event.
        EngineError: the engine was lost; likewise.
    """
    answer = call.answer
    if streamed:
        events = stream_events(answer, call, keep_alive_seconds)
        return EventStream(events, answer.close, answer.patience())
    try:
        payload = await answered(_collect(call, keep_alive_seconds), request)
    finally:
        answer.close()
    return Response(msgspec.json.encode(payload), media_type="application/json")


async def _collect(call: Call, pause: float) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in call.answer.choices]
    entries: list[list[LogprobEntry]] = [[] for _ in call.answer.choices]
    async for item in call.answer.deltas(pause):
        if item is not None:
            choice, delta = item
            texts[choice.index].append(delta.text)
            entries[choice.index].extend(delta.logprobs)
    return call.whole(["".join(parts) for parts in texts], entries)
