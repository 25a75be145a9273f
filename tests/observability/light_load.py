"""A few requests of every kind that the boards tell apart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from benchmarks.workload import code_prompt
from engine.embedded import embedded_model_path
from engine.tokenizer import Tokenizer

SELECTS = 1500  # tokens; over the embedded model's dense_below, so that retrieval heads select


class LightLoad:
    """Streams, plain answers, one that selects, one that is refused, one whose client leaves."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._tokenizer = Tokenizer.from_folder(Path(embedded_model_path()))
        self._rounds = 0

    def run(self) -> None:
        """One round, all requests at once; prompts are new in every round but share a prefix."""
        self._rounds += 1
        asyncio.run(self._round())

    async def _round(self) -> None:
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=100
        ) as client:
            long = code_prompt(self._tokenizer, SELECTS, seed=0)
            await asyncio.gather(
                self._answered(client, prompt=[*long, self._rounds], max_tokens=12),
                self._answered(client, prompt="import os\n", max_tokens=8, n=2),
                self._streamed(client, prompt="def mean(values):\n", max_tokens=16),
                self._refused(client),
                self._left(client),
            )

    async def _answered(self, client: httpx.AsyncClient, **fields: Any) -> None:
        body = {"ignore_eos": True, **fields}
        (await client.post("/v1/completions", json=body)).raise_for_status()

    async def _streamed(self, client: httpx.AsyncClient, **fields: Any) -> None:
        body = {"ignore_eos": True, "stream": True, **fields}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            assert [line async for line in answer.aiter_lines() if line][-1] == "data: [DONE]"

    async def _refused(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": [7] * 40_000}  # longer than the model's context
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 400, answer.text

    async def _left(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "class Queue:\n", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    break
