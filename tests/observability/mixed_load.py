"""Some minutes of a workload as people have it: short and long prompts, streams, mistakes."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import httpx

from benchmarks.workload import code_prompt
from engine.embedded import embedded_model_path
from engine.tokenizer import Tokenizer

LENGTHS = (60, 300, 1200, 2400, 5000, 9000)  # prompt tokens
WEIGHTS = (30, 25, 18, 14, 9, 4)


class MixedLoad:
    """`clients` that each send one request after the other, with pauses, in waves."""

    def __init__(self, url: str, key: str, clients: int, seed: int = 0) -> None:
        self._client = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600
        )
        self._clients = clients
        self._random = random.Random(seed)
        self._tokenizer = Tokenizer.from_folder(Path(embedded_model_path()))

    async def run(self, seconds: float) -> None:
        """Send requests for so long; those that are under way then are waited for."""
        end = time.monotonic() + seconds
        async with self._client:
            await asyncio.gather(*(self._one_client(i, end) for i in range(self._clients)))

    async def _one_client(self, number: int, end: float) -> None:
        while time.monotonic() < end:
            wave = time.monotonic() % 120 < 70  # the later clients rest between waves
            if number < self._clients // 2 or wave:
                await self._request()
            await asyncio.sleep(self._random.uniform(0.2, 2))

    async def _request(self) -> None:
        draw = self._random
        if draw.random() < 0.05:
            await self._client.post("/v1/completions", json={"prompt": [7] * 40_000})
            return
        (length,) = draw.choices(LENGTHS, WEIGHTS)
        document = draw.randrange(6) if draw.random() < 0.4 else draw.randrange(1000)
        body = {
            "prompt": code_prompt(self._tokenizer, length + draw.randrange(60), document),
            "max_tokens": draw.randrange(8, 120),
            "stream": True,
        }
        patience = draw.randrange(2, 20) if draw.random() < 0.08 else None
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            chunks = 0
            async for line in answer.aiter_lines():
                chunks += line.startswith("data: ")
                if patience is not None and chunks > patience:
                    return
