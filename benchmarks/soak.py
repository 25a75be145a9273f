"""`rtpurbo bench soak`: steady load for a long time, and whether anything grows.

Each stream makes a request, waits for the whole answer, and begins the next one at its next period,
so the load is the same in every minute. Once a minute the memory, descriptors and threads of both
processes are read, and the latencies of the minute summed up. After the first minutes, in which
caches fill, every series must be flat (`benchmarks.trend`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.completion_client import CompletionClient, LostError, Manners
from benchmarks.hardware import describe_hardware
from benchmarks.process_watch import engine_of, footprint, read_metrics
from benchmarks.server_process import ServerProcess, serving
from benchmarks.trend import Trend, fit_trend
from benchmarks.workload import code_prompt
from engine.tokenizer import Tokenizer

# How much a series may certainly grow over the run, as a share of its mean.
ALLOWED = {"rss_mib": 0.02, "descriptors": 0.0, "threads": 0.0, "ms": 0.10}
DIFFERENT_PROMPTS = 40  # in turn, so that some are cached and some are not


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakBench:
    """What to run against which server."""

    model: str
    minutes: int = 30
    warm_minutes: int = 3  # of them not judged
    streams: int = 2
    period: float = 6.0  # seconds between the starts of a stream's requests
    prompt_tokens: int = 200
    output_tokens: int = 48
    note: str = ""  # on the circumstances, kept with the figures


@dataclass(slots=True)
class Latencies:
    """Of the requests that ended within a minute, in milliseconds."""

    first_token: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Minute:
    """One line of the series."""

    minute: int
    requests: int
    front_end_rss_mib: float
    front_end_descriptors: int
    front_end_threads: int
    engine_rss_mib: float
    engine_descriptors: int
    engine_threads: int
    first_token_p50_ms: float
    first_token_p90_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float


def run_soak(bench: SoakBench, console: Console) -> dict[str, Any]:
    """Run, print a table, and return the figures that the JSON line holds."""
    started = datetime.now(UTC)
    with serving(bench.model, "--max-num-seqs", str(max(bench.streams, 2))) as server:
        run = _Run(bench, server, console)
        asyncio.run(run.main())
        metrics = read_metrics(server.url)
    trends = judge(run.minutes, bench.warm_minutes)
    result = {
        "benchmark": "soak",
        "date": started.isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "workload": {**asdict(bench), "model": Path(bench.model).name},
        "requests": sum(minute.requests for minute in run.minutes),
        "lost": run.lost,
        "generated_tokens": int(metrics["rtpurbo_generated_tokens_total"]),
        "engine_restarts": int(metrics["rtpurbo_engine_restarts_total"]),
        "minutes": [asdict(minute) for minute in run.minutes],
        "trends": {name: {**asdict(t), "flat": t.flat} for name, t in trends.items()},
        "flat": all(trend.flat for trend in trends.values()),
    }
    console.print(_table(trends))
    return result


def judge(minutes: Sequence[Minute], warm_minutes: int) -> dict[str, Trend]:
    """The trend of every series after the warm-up."""
    judged = minutes[warm_minutes:]
    names = [name for name in Minute.__dataclass_fields__ if name not in ("minute", "requests")]
    times = [float(minute.minute) for minute in judged]
    trends = {}
    for name in names:
        allowed = next(share for end, share in ALLOWED.items() if name.endswith(end))
        values = [float(getattr(minute, name)) for minute in judged]
        trends[name] = fit_trend(times, values, allowed)
    return trends


class _Run:
    def __init__(self, bench: SoakBench, server: ServerProcess, console: Console) -> None:
        self.minutes: list[Minute] = []
        self.lost = 0
        self._bench = bench
        self._server = server
        self._console = console
        self._newest = Latencies()
        tokenizer = Tokenizer.from_folder(Path(bench.model))
        self._prompts = [
            code_prompt(tokenizer, bench.prompt_tokens, seed) for seed in range(DIFFERENT_PROMPTS)
        ]

    async def main(self) -> None:
        client = CompletionClient(self._server.url, timeout=120.0)
        streams = [
            asyncio.create_task(self._stream(client, number))
            for number in range(self._bench.streams)
        ]
        begun = time.monotonic()
        try:
            for minute in range(self._bench.minutes):
                await asyncio.sleep(max(begun + 60 * (minute + 1) - time.monotonic(), 0))
                self.minutes.append(self._take_minute(minute))
                self._console.print(self.minutes[-1], markup=False)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            await client.close()

    async def _stream(self, client: CompletionClient, number: int) -> None:
        """Requests at fixed times, whether the one before was quick or slow."""
        bench = self._bench
        begun = time.monotonic() + bench.period * number / bench.streams
        for place in itertools.count():
            await asyncio.sleep(max(begun + place * bench.period - time.monotonic(), 0))
            body = {
                "prompt": self._prompts[(place * bench.streams + number) % DIFFERENT_PROMPTS],
                "max_tokens": bench.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            try:
                answer = await client.complete(body, Manners(stream=True))
            except LostError as error:
                self.lost += 1
                self._console.print(f"lost: {error}", markup=False)
                continue
            self._newest.first_token.append(1000 * (answer.arrivals[0] - answer.sent))
            self._newest.inter_token += [1000 * (b - a) for a, b in pairwise(answer.arrivals)]

    def _take_minute(self, minute: int) -> Minute:
        latencies, self._newest = self._newest, Latencies()
        front_end, engine = footprint(self._server.pid), engine_of(self._server.pid)
        assert engine is not None, "the engine is gone"
        held = footprint(engine.pid)
        return Minute(
            minute=minute + 1,
            requests=len(latencies.first_token),
            front_end_rss_mib=round(front_end.rss_mib, 2),
            front_end_descriptors=front_end.descriptors,
            front_end_threads=front_end.threads,
            engine_rss_mib=round(held.rss_mib, 2),
            engine_descriptors=held.descriptors,
            engine_threads=held.threads,
            first_token_p50_ms=_quantile(latencies.first_token, 0.5),
            first_token_p90_ms=_quantile(latencies.first_token, 0.9),
            inter_token_p50_ms=_quantile(latencies.inter_token, 0.5),
            inter_token_p99_ms=_quantile(latencies.inter_token, 0.99),
        )


def _quantile(values: Sequence[float], share: float) -> float:
    """NaN-free: a minute without a request is a fault of the run."""
    assert values, "no request ended within a minute"
    ordered = sorted(values)
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 2)


def _table(trends: dict[str, Trend]) -> Table:
    table = Table(title="growth over the minutes judged, share of the mean, 95 % interval")
    for column in ("series", "mean", "growth", "allowed", ""):
        table.add_column(column)
    for name, trend in trends.items():
        table.add_row(
            name,
            f"{trend.mean:.2f}",
            f"{trend.growth:+.1%} ({trend.growth_low:+.1%} to {trend.growth_high:+.1%})",
            f"{trend.allowed:.0%}",
            "flat" if trend.flat else "GROWS",
        )
    return table
