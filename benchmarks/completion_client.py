"""One completion over HTTP, as a client sees it: whole, streamed, read slowly, or left early.

What comes back is what two runs of one request are compared by: texts, reasons, log-probabilities
and usage, without ids and times.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

PATH = "/v1/completions"
SMALL_BUFFER = 4096  # bytes in the socket of a slow reader, so that the server's own fill up
MOST_WAIT = 1.0  # seconds before a refused call is made again, whatever the server proposes


class LostError(Exception):
    """A request that was admitted got no whole answer."""


class ClientLeft(Exception):  # noqa: N818 - nothing is wrong: this client wanted to leave
    """The client closed its connection before the answer was whole."""


@dataclass(slots=True)
class ChoiceAnswer:
    """One choice. Log-probabilities are by token: text, logprob, offset."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[str, float | None, int]] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """A whole answer and when its parts came, in seconds of a monotonic clock."""

    choices: list[ChoiceAnswer]
    usage: tuple[int, int] = (0, 0)  # prompt and completion tokens
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of chunks with text
    refusals: int = 0  # 429 and 503 before it was admitted


@dataclass(frozen=True, slots=True)
class Manners:
    """How the client behaves."""

    stream: bool = True
    read_pause: float = 0.0  # seconds between two chunks
    leave_after: float | None = None  # seconds; the connection is then closed


class CompletionClient:
    """Calls one server. `close` must follow."""

    def __init__(self, url: str, timeout: float) -> None:
        """`timeout` is the longest silence, in seconds, before an answer counts as lost."""
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
        self._usual = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)
        self._slow = httpx.AsyncClient(
            base_url=url,
            timeout=timeout,
            transport=httpx.AsyncHTTPTransport(socket_options=small, limits=limits),
        )

    async def close(self) -> None:
        await self._usual.aclose()
        await self._slow.aclose()

    async def complete(self, body: dict[str, Any], manners: Manners) -> Answer:
        """The answer; refused calls are made again until they are admitted.

        Raises:
            LostError: an error, or an end before the answer was whole.
            ClientLeft: as `manners` ask for.
        """
        refusals = 0
        while True:
            try:
                async with asyncio.timeout(manners.leave_after):
                    answer = await self._call(body, manners)
            except TimeoutError:
                raise ClientLeft from None
            except httpx.HTTPError as error:
                raise LostError(f"{type(error).__name__}: {error}") from error
            if isinstance(answer, Answer):
                answer.refusals = refusals
                return answer
            refusals += 1
            await asyncio.sleep(min(answer, MOST_WAIT))

    async def _call(self, body: dict[str, Any], manners: Manners) -> Answer | float:
        """The answer, or the seconds to wait that a refusal names."""
        sent = time.monotonic()
        client = self._slow if manners.read_pause else self._usual
        wanted = dict(body)
        if manners.stream:
            wanted |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", PATH, json=wanted) as response:
            if response.status_code in (429, 503):
                await response.aread()
                if "retry-after" not in response.headers:
                    raise LostError(f"{response.status_code} without Retry-After")
                return float(response.headers["retry-after"])
            if response.status_code != 200:
                raise LostError(f"{response.status_code} {(await response.aread())[:300]!r}")
            answer = Answer([ChoiceAnswer() for _ in range(body.get("n", 1))], sent=sent)
            if manners.stream:
                await _read_stream(response.aiter_lines(), answer, manners.read_pause)
            else:
                _take(answer, json.loads(await response.aread()))
        if any(choice.finish_reason is None for choice in answer.choices):
            raise LostError("the answer ended without a finish_reason")
        return answer


async def _read_stream(lines: AsyncIterator[str], answer: Answer, pause: float) -> None:
    """Chunks up to [DONE], which must come last, all under one id and creation time."""
    names: set[tuple[str, int]] = set()
    done = False
    async for line in lines:
        if not line.startswith("data: "):
            continue
        if done:
            raise LostError("something came after [DONE]")
        if line == "data: [DONE]":
            done = True
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise LostError(f"error event: {chunk['error']['message']}")
        names.add((chunk["id"], chunk["created"]))
        if chunk["choices"]:
            answer.arrivals.append(time.monotonic())
        _take(answer, chunk)
        if pause:
            await asyncio.sleep(pause)
    if not done:
        raise LostError("the stream ended without [DONE]")
    if len(names) != 1:
        raise LostError(f"the stream has {len(names)} ids or creation times")


def _take(answer: Answer, part: dict[str, Any]) -> None:
    """Add a chunk, or a whole answer."""
    for found in part["choices"]:
        choice = answer.choices[found["index"]]
        if choice.finish_reason is not None:
            raise LostError("a choice went on after its finish_reason")
        choice.text += found["text"]
        choice.finish_reason = found["finish_reason"]
        if found["logprobs"] is not None:
            names = ("tokens", "token_logprobs", "text_offset")
            choice.logprobs += zip(*(found["logprobs"][name] for name in names), strict=True)
    if part.get("usage"):
        answer.usage = (part["usage"]["prompt_tokens"], part["usage"]["completion_tokens"])
