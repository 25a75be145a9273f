"""`rtpurbo bench chaos`: faults at random against a real server, and every answer checked.

First every request is answered without faults, alone and then among others: that is the right
answer. Then clients ask for them again and again, streaming or not, slowly or leaving early, while
the engine process is killed, stopped, and sent garbage. Nothing admitted may be lost and no answer
may differ; at the end the server must hold no page, and no more descriptors and memory than before.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.chaos_checker import Verdict, difference
from benchmarks.chaos_nemesis import Nemesis
from benchmarks.chaos_requests import (
    ChaosRequest,
    MakePrompt,
    draw_manners,
    draw_requests,
    with_stop,
)
from benchmarks.completion_client import Answer, ClientLeft, CompletionClient, LostError, Manners
from benchmarks.hardware import describe_hardware
from benchmarks.process_watch import Footprint, footprint, read_metrics
from benchmarks.server_process import ServerProcess, serving

SETTLE_SECONDS = 60.0  # in which a server without work must come to rest
MORE_MIB = 24.0  # by which the front end's memory may be larger at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosBench:
    """What to run against which server."""

    model: str
    make_prompt: MakePrompt
    seconds: float = 120.0
    seed: int = 0
    clients: int = 4
    requests: int = 24  # different ones
    lengths: tuple[int, ...] = (12, 100, 400, 1300)  # prompt tokens
    most_tokens: int = 48  # generated
    # Seconds from readiness to the next fault: at least, and on average beyond that. A request that
    # loses four engines in a row before it gets any further is taken for their killer, rightly.
    least_pause: float = 6.0
    mean_pause: float = 2.0
    silence: float = 8.0  # seconds without a report after which an engine hangs
    tolerance: float = 2e-3  # of log-probabilities
    timeout: float = 180.0  # seconds without a byte after which a request is lost
    program: tuple[str, ...] = ("server.cli", "serve")
    # Short chunks: how long silence is in order depends on the tokens of a step.
    flags: tuple[str, ...] = ("--max-num-seqs", "4", "--max-batch-tokens", "256")


def run_chaos(bench: ChaosBench, console: Console) -> dict[str, Any]:
    """Run, print a table, and return the figures that the JSON line holds."""
    settings = {
        "hang_seconds": bench.silence,
        "engine_restart_window_seconds": 1.0,  # no restart counts for long: none is the last one
        "max_queued_requests": max(2 * bench.clients, 16),
    }
    run = _Run(bench, console)
    with serving(bench.model, *bench.flags, program=bench.program, settings=settings) as server:
        asyncio.run(run.main(server))
    run.check_nothing_is_left(server)
    result = run.result()
    console.print(_table(result))
    for line in (*run.verdict.lost, *run.verdict.wrong, *run.verdict.unclean):
        console.print(line, markup=False)
    return result


class _Run:
    def __init__(self, bench: ChaosBench, console: Console) -> None:
        self.verdict = Verdict()
        self._bench = bench
        self._console = console
        self._answers: list[tuple[ChaosRequest, Answer]] = []
        self._unstable = 0
        self._nemesis: Nemesis
        self._before: Footprint
        self._after: Footprint
        self._metrics: dict[str, float] = {}

    async def main(self, server: ServerProcess) -> None:
        bench = self._bench
        await self._answer_undisturbed(server)
        await self._settle(server)
        self._before = footprint(server.pid)
        self._console.print(f"{len(self._answers)} requests; faults for {bench.seconds:g} s …")
        self._nemesis = Nemesis(
            server.url, server.pid, bench.seed, bench.least_pause, bench.mean_pause
        )
        client = CompletionClient(server.url, bench.timeout)
        striking = asyncio.create_task(self._nemesis.run(bench.seconds))
        try:
            await asyncio.gather(
                *(self._ask(client, number, striking) for number in range(bench.clients))
            )
            await striking
        finally:
            striking.cancel()
            await client.close()
        await self._settle(server)
        self._after = footprint(server.pid)
        self._metrics = read_metrics(server.url)
        self._check_at_rest()

    async def _answer_undisturbed(self, server: ServerProcess) -> None:
        """Each request alone, then all at once as streams. One that differs between the two hangs
        on the last digits of a float: it is counted and not used."""
        bench = self._bench
        requests = draw_requests(
            bench.seed, bench.requests, bench.make_prompt, bench.lengths, bench.most_tokens
        )
        client = CompletionClient(server.url, bench.timeout)
        gate = asyncio.Semaphore(bench.clients)

        async def among_others(request: ChaosRequest) -> Answer:
            async with gate:
                return await client.complete(request.body, Manners(stream=True))

        try:
            alone = [await client.complete(r.body, Manners(stream=False)) for r in requests]
            for request, answer in list(zip(requests, alone, strict=True)):
                stopped = with_stop(request, answer.choices[0].text)
                if stopped is not None and int(request.name) % 3 == 0:
                    requests.append(stopped)
                    alone.append(await client.complete(stopped.body, Manners(stream=False)))
            together = await asyncio.gather(*map(among_others, requests))
        finally:
            await client.close()
        for request, one, other in zip(requests, alone, together, strict=True):
            if difference(one, other, bench.tolerance) is None:
                self._answers.append((request, one))
            else:
                self._unstable += 1

    async def _ask(self, client: CompletionClient, number: int, until: asyncio.Task[None]) -> None:
        """One client: request after request until the nemesis rests."""
        seed = self._bench.seed * 100 + number
        rng, manners_of = random.Random(seed), draw_manners(seed)
        while not until.done():
            request, want = rng.choice(self._answers)
            manners = next(manners_of)
            try:
                got = await client.complete(request.body, manners)
            except ClientLeft:
                self.verdict.counts["left"] += 1
            except LostError as error:
                self.verdict.lost.append(f"request {request.name}: {error}")
            else:
                self.verdict.judge(request.name, want, got, self._bench.tolerance)

    async def _settle(self, server: ServerProcess) -> None:
        """Wait until the server says that it has nothing to do."""
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            values = await asyncio.to_thread(read_metrics, server.url)
            if not any(values[name] for name in HELD) and values["rtpurbo_engine_up"]:
                break
            await asyncio.sleep(0.3)
        await asyncio.sleep(1.0)  # connections that were closed are gone on both sides

    def _check_at_rest(self) -> None:
        expect, before, after = self.verdict.expect, self._before, self._after
        for name in HELD:
            expect(f"{name} is {self._metrics[name]:g} at rest", self._metrics[name] == 0)
        expect(
            f"descriptors: {before.descriptors} before, {after.descriptors} after",
            after.descriptors <= before.descriptors,
        )
        expect(
            f"threads: {before.threads} before, {after.threads} after",
            after.threads <= before.threads,
        )
        expect(
            f"memory: {before.rss_mib:.0f} MiB before, {after.rss_mib:.0f} after",
            after.rss_mib <= before.rss_mib + MORE_MIB,
        )

    def check_nothing_is_left(self, server: ServerProcess) -> None:
        """After the end of the server."""
        expect, nemesis = self.verdict.expect, self._nemesis
        code = server.process.returncode
        expect(f"the server ended with code {code}", code == 0)
        orphans = sorted(pid for pid in nemesis.engines if psutil.pid_exists(pid))
        expect(f"engine processes {orphans} still live", not orphans)
        folders = sorted(str(path) for path in nemesis.folders if path.exists())
        expect(f"folders {folders} are left", not folders)

    def result(self) -> dict[str, Any]:
        nemesis, verdict = self._nemesis, self.verdict
        outages = sorted(nemesis.outages)
        return {
            "benchmark": "chaos",
            "hardware": describe_hardware(),
            "model": Path(self._bench.model).name,
            "seconds": self._bench.seconds,
            "seed": self._bench.seed,
            "clients": self._bench.clients,
            "pause_seconds": [self._bench.least_pause, self._bench.mean_pause],
            "different_requests": len(self._answers),
            "left_out_as_unstable": self._unstable,
            "strikes": dict(nemesis.strikes),
            "restarts": int(self._metrics["rtpurbo_engine_restarts_total"]),
            "resumed": int(self._metrics["rtpurbo_requests_resumed_total"]),
            "finished": verdict.counts["finished"],
            "left": verdict.counts["left"],
            "refusals": verdict.counts["refusals"],
            "lost": len(verdict.lost),
            "wrong": len(verdict.wrong),
            "unclean": len(verdict.unclean),
            "outage_seconds_median": _quantile(outages, 0.5),
            "outage_seconds_longest": _quantile(outages, 1.0),
            "rss_mib": [round(self._before.rss_mib, 1), round(self._after.rss_mib, 1)],
            "descriptors": [self._before.descriptors, self._after.descriptors],
            "passed": verdict.passed,
        }


HELD = (
    "rtpurbo_requests_running",
    "rtpurbo_requests_waiting",
    "rtpurbo_kv_cache_usage_ratio",
)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 3)


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"chaos, {result['seconds']:g} s, seed {result['seed']}", show_header=False)
    strikes = ", ".join(f"{count} {name}" for name, count in sorted(result["strikes"].items()))
    rows = {
        "faults": strikes or "none",
        "engine restarts": result["restarts"],
        "requests carried over a restart": result["resumed"],
        "finished, compared": result["finished"],
        "left by their clients": result["left"],
        "refused with Retry-After, then admitted": result["refusals"],
        "lost": result["lost"],
        "wrong": result["wrong"],
        "outage, median and longest, s": f"{result['outage_seconds_median']}, "
        f"{result['outage_seconds_longest']}",
        "memory of the front end, MiB": "{} -> {}".format(*result["rss_mib"]),
        "its descriptors": "{} -> {}".format(*result["descriptors"]),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
