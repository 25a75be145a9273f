"""A stream that decodes all the time, beside which something else is measured."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import httpx


async def chunk_times(
    client: httpx.AsyncClient, prompt: str | list[int], max_tokens: int
) -> AsyncIterator[float]:
    """`time.perf_counter` at every chunk of one streamed completion of `max_tokens` tokens."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield time.perf_counter()


async def decode_forever(
    client: httpx.AsyncClient, prompt: str | list[int], note_gap: Callable[[float], None]
) -> None:
    """One completion after the other, until cancelled; tells of the seconds between chunks."""
    while True:
        before = None
        async for now in chunk_times(client, prompt, 4000):
            if before is not None:
                note_gap(now - before)
            before = now
