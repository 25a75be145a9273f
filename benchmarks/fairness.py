"""What a long prompt does to others, and what their comfort costs it: `python -m
benchmarks.fairness [MODEL] [--context 12000] [--aims 0,100,1000]`.

A stream decodes; a long prompt arrives; until its first token, short requests come one after the
other. For every `--max-step-ms` a server of its own (0: no aim): gaps between the stream's chunks,
first tokens of the short requests, and of the long prompt, which is first measured alone. Ends with
one JSON line; seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.endless_stream import chunk_times, decode_forever
from benchmarks.hardware import describe_hardware
from benchmarks.server_process import serving
from benchmarks.workload import code_prompt
from engine.embedded import embedded_model_path
from engine.tokenizer import Tokenizer

SHORT_TOKENS = 48


async def first_token(client: httpx.AsyncClient, prompt: list[int]) -> float:
    """Seconds to the only token of a completion; `inf` if there is none."""
    begun, first = time.perf_counter(), math.inf
    async for now in chunk_times(client, prompt, 1):
        first = min(first, now)
    return first - begun


async def measure(url: str, tokenizer: Tokenizer, context: int, warm: float) -> dict[str, Any]:
    """Figures of one server. Long prompts share no prefix, short ones have no whole block."""
    longs = [code_prompt(tokenizer, context, seed) for seed in (1, 2)]
    shorts = itertools.cycle([code_prompt(tokenizer, SHORT_TOKENS, 9 + seed) for seed in range(32)])
    start = code_prompt(tokenizer, 1000, 3)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        alone = await first_token(client, longs[0])
        gaps: list[float] = []
        stream = asyncio.create_task(decode_forever(client, start, gaps.append))
        await asyncio.sleep(warm)
        quiet = statistics.median(gaps)
        gaps.clear()
        long = asyncio.create_task(first_token(client, longs[1]))
        short: list[float] = []
        while not long.done():
            short.append(await first_token(client, next(shorts)))
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        return {
            "long_alone": round(alone, 3),
            "long": round(await long, 3),
            "gap_before": round(quiet, 4),
            "gap": spread(gaps),
            "short_first_token": spread(short[:-1] or short),  # the last one may have had no rival
        }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "median": round(statistics.median(values), 4),
        "largest": round(max(values), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a long prompt does to others.")
    parser.add_argument("model", nargs="?", default=str(embedded_model_path()))
    parser.add_argument("--context", type=int, default=12_000, help="tokens of the long prompt")
    parser.add_argument("--aims", default="0,100,1000", help="max-step-ms of the servers")
    parser.add_argument("--warm", type=float, default=5.0, help="seconds of decoding before it")
    given = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_folder(Path(given.model))
    aims: dict[str, Any] = {}
    for aim in given.aims.split(","):
        with serving(given.model, "--max-step-ms", aim) as server:
            aims[aim] = asyncio.run(measure(server.url, tokenizer, given.context, given.warm))
        print(f"--max-step-ms {aim}: {json.dumps(aims[aim])}", flush=True)
    work = {"context": given.context, "short": SHORT_TOKENS}
    print(json.dumps({"hardware": describe_hardware(), **work, "by_max_step_ms": aims}))


if __name__ == "__main__":
    main()
