"""Answers of a real server process as they come, several at a time, and what comes of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from benchmarks.server_process import ServerProcess


class Stream:
    """One answer as it comes."""

    def __init__(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.comments = self.pauses = 0
        self.done = False
        self._client = client
        self._body = body

    async def run(self) -> None:
        url = "/v1/completions"
        if not self._body.get("stream"):
            answer = await self._client.post(url, json=self._body)
            assert answer.status_code == 200, answer.text
            self.chunks.append(answer.json())
            self.done = True
            return
        async with self._client.stream("POST", url, json=self._body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                self._take(line)

    def _take(self, line: str) -> None:
        assert not self.done or not line, "[DONE] is last"
        if line.startswith(":"):
            self.comments += 1
            self.pauses += line == ": paused: the engine is restarting"
        elif line == "data: [DONE]":
            self.done = True
        elif line:
            self.chunks.append(json.loads(line.removeprefix("data: ")))

    def answer(self) -> dict[str, Any]:
        """All chunks joined, less what differs between any two runs: id, created and times."""
        assert self.done
        assert len({(chunk["id"], chunk["created"]) for chunk in self.chunks}) == 1
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        logprobs: dict[str, list[Any]] = {}
        for choice in choices:
            for name, values in (choice["logprobs"] or {}).items():
                logprobs.setdefault(name, []).extend(values or [])
        last = self.chunks[-1]
        metrics = last.get("metrics", {})
        return {
            "text": "".join(choice["text"] for choice in choices),
            "logprobs": logprobs,
            "finish": [c["finish_reason"] for c in choices if c["finish_reason"]],
            "usage": last.get("usage"),
            "attended": (metrics.get("attended_tokens_mean"), metrics.get("attended_fraction")),
        }


async def ask_all(
    server: ServerProcess, requests: list[dict[str, Any]], disturb: Any = None
) -> list[Stream]:
    """Ask in this order and wait for all answers; `disturb` is called while they come."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        streams = [Stream(client, body) for body in requests]
        tasks = []
        for stream in streams:
            tasks.append(asyncio.create_task(stream.run()))
            await asyncio.sleep(0.01)  # so that they arrive in this order
        if disturb is not None:
            await disturb(streams)
        await asyncio.gather(*tasks)
    return streams


async def until(condition: Any) -> None:
    """Wait for something that another process does."""
    while not condition():  # noqa: ASYNC110 - the state of another process has no event
        await asyncio.sleep(0.01)
