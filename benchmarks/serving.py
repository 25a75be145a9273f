"""`rtpurbo bench serving`: our server beside transformers' dense `generate`, in one run.

Workload: prompts of real Python source, greedy decoding, no stop. Ours is measured by a client over
HTTP (time to first token, then the gap from first to last token); the peer is called in process,
without a server, so every overhead counts against us. Both run alone, one after the other, in the
machine's full precision (float32 on CPU, bfloat16 on CUDA) with the same number of threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import describe_hardware
from benchmarks.server_process import ServerProcess, serving
from benchmarks.workload import code_prompt
from engine.tokenizer import Tokenizer

REQUEST_TIMEOUT = 3600.0  # seconds; a dense prefill of a long prompt on two cores takes minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingBench:
    """What to measure."""

    model: str
    prompt_tokens: int = 16384
    output_tokens: int = 64  # per stream; the first one is prefill
    streams: tuple[int, ...] = (1, 8)
    threads: int | None = None  # torch threads of both sides; None leaves torch's default
    peer: bool = True


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """One streamed completion as the client saw it; seconds of `time.perf_counter`."""

    sent: float
    first: float
    last: float
    tokens: int
    attended_fraction: float | None


def run_serving_bench(bench: ServingBench, console: Console) -> dict[str, Any]:
    """Measure, print a table, and return the figures that the JSON line holds."""
    tokenizer = Tokenizer.from_folder(Path(bench.model))
    console.print(f"measuring rtpurbo on {bench.prompt_tokens}-token prompts …")
    ours = _measure_ours(bench, tokenizer)
    result: dict[str, Any] = {
        "benchmark": "serving",
        "hardware": describe_hardware(),
        "workload": {
            "prompt_tokens": bench.prompt_tokens,
            "output_tokens": bench.output_tokens,
            "streams": list(bench.streams),
            "model": Path(bench.model).name,
        },
        "rtpurbo": ours,
    }
    if bench.peer:
        console.print("measuring transformers' dense generate …")
        peer = _measure_peer(bench, tokenizer)
        result["transformers"] = peer
        result["ratio"] = _ratios(ours, peer)
    console.print(_table(result))
    return result


def _measure_ours(bench: ServingBench, tokenizer: Tokenizer) -> dict[str, Any]:
    """Cold prefills first, one prompt after the other; then decoding, which starts from the prefix
    cache so that all streams of a round decode together from their first token on."""
    prompts = [
        code_prompt(tokenizer, bench.prompt_tokens, seed) for seed in range(max(bench.streams))
    ]
    warm_up = code_prompt(tokenizer, min(256, bench.prompt_tokens), seed=-1)
    flags = ["--max-num-seqs", str(max(bench.streams))]
    if bench.threads:
        flags += ["--threads", str(bench.threads)]
    with serving(bench.model, *flags) as server:
        asyncio.run(_run_streams(server, [warm_up], 8))
        cold = [asyncio.run(_run_streams(server, [prompt], 1))[0] for prompt in prompts]
        decode: dict[str, float] = {}
        overhead: dict[str, float] = {}
        fractions: list[float] = []
        for streams in bench.streams:
            marks = [_cpu_seconds(server.pid)]
            for tokens in (1, bench.output_tokens):
                times = asyncio.run(_run_streams(server, prompts[:streams], tokens))
                marks.append(_cpu_seconds(server.pid))
            decode[str(streams)] = sum((t.tokens - 1) / (t.last - t.first) for t in times)
            # The short round takes the prompts' share out: parsing, validation, the first token.
            cpu = (marks[2] - marks[1]) - (marks[1] - marks[0])
            overhead[str(streams)] = 1000 * cpu / sum(t.tokens - 1 for t in times)
            fractions += [t.attended_fraction for t in times if t.attended_fraction is not None]
    return {
        "prefill_seconds": statistics.median(t.first - t.sent for t in cold),
        "decode_tokens_per_second": decode,
        "front_end_cpu_ms_per_streamed_token": overhead,
        "attended_fraction": statistics.fmean(fractions) if fractions else None,
    }


def _cpu_seconds(pid: int) -> float:
    """User and system time of one process so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _run_streams(
    server: ServerProcess, prompts: Sequence[Sequence[int]], tokens: int
) -> list[StreamTimes]:
    """All prompts at once, each as one stream of `tokens` tokens."""
    async with httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT) as client:
        return list(await asyncio.gather(*(_stream(client, prompt, tokens) for prompt in prompts)))


async def _stream(client: httpx.AsyncClient, prompt: Sequence[int], tokens: int) -> StreamTimes:
    body = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    first = last = None
    usage: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if chunk["choices"]:
                last = time.perf_counter()
                first = first or last
            else:
                usage = chunk
    assert first is not None
    assert last is not None
    return StreamTimes(
        sent,
        first,
        last,
        usage["usage"]["completion_tokens"],
        usage["metrics"]["attended_fraction"],
    )


def _measure_peer(bench: ServingBench, tokenizer: Tokenizer) -> dict[str, Any]:
    job = {
        "model": bench.model,
        "prompt": code_prompt(tokenizer, bench.prompt_tokens, 0),
        "output_tokens": max(4, bench.output_tokens // 4),
        "streams": list(bench.streams),
        "threads": bench.threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.transformers_peer"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    rates = zip(
        ours["decode_tokens_per_second"].items(),
        peer["decode_tokens_per_second"].values(),
        strict=True,
    )
    return {
        "prefill": peer["prefill_seconds"] / ours["prefill_seconds"],
        "decode": {streams: rate / other for (streams, rate), other in rates},
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['workload']['prompt_tokens']} prompt tokens")
    for column in ("", "rtpurbo", "transformers", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    ours, peer, ratio = result["rtpurbo"], result.get("transformers"), result.get("ratio")
    table.add_row(
        "prefill, s",
        f"{ours['prefill_seconds']:.2f}",
        f"{peer['prefill_seconds']:.2f}" if peer else "–",
        f"{ratio['prefill']:.1f}x" if ratio else "–",
    )
    for streams, rate in ours["decode_tokens_per_second"].items():
        table.add_row(
            f"decode, {streams} stream(s), tokens/s",
            f"{rate:.1f}",
            f"{peer['decode_tokens_per_second'][streams]:.1f}" if peer else "–",
            f"{ratio['decode'][streams]:.1f}x" if ratio else "–",
        )
    return table
