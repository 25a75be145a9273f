"""`rtpurbo bench chaos`: faults at random against a real server, and every answer checked.

First every request is answered without faults, alone and then among others: that is the right
answer. Then clients ask for them again and again, streaming or not, slowly or leaving early, while
the engine process is killed, stopped, and sent garbage. Nothing admitted may be lost and no answer
may differ; at the end the server must hold no page, and no more descriptors and memory than before.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from benchmarks.chaos_rest import Rest, check_at_rest, check_nothing_is_left
from benchmarks.completion_client import Answer, ClientLeft, CompletionClient, LostError, Manners
from benchmarks.hardware import describe_hardware
from benchmarks.server_process import ServerProcess, serving


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
    check_nothing_is_left(server, run.nemesis, run.verdict)
    result = run.result()
    console.print(_table(result))
    for line in (*run.verdict.lost, *run.verdict.wrong, *run.verdict.unclean):
        console.print(line, markup=False)
    return result


class _Run:
    def __init__(self, bench: ChaosBench, console: Console) -> None:
        self.verdict = Verdict()
        self.nemesis: Nemesis
        self._bench = bench
        self._console = console
        self._answers: list[tuple[ChaosRequest, Answer]] = []
        self._unstable = 0
        self._before: Rest
        self._after: Rest

    async def main(self, server: ServerProcess) -> None:
        bench = self._bench
        await self._answer_undisturbed(server)
        self._before = await Rest.of(server)
        self._console.print(f"{len(self._answers)} requests; faults for {bench.seconds:g} s …")
        self.nemesis = Nemesis(
            server.url, server.pid, bench.seed, bench.least_pause, bench.mean_pause
        )
        client = CompletionClient(server.url, bench.timeout)
        striking = asyncio.create_task(self.nemesis.run(bench.seconds))
        try:
            await asyncio.gather(
                *(self._ask(client, number, striking) for number in range(bench.clients))
            )
            await striking
        finally:
            striking.cancel()
            await client.close()
        self._after = await Rest.of(server)
        check_at_rest(self._before, self._after, self.verdict)

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

    def result(self) -> dict[str, Any]:
        nemesis, verdict, before, after = self.nemesis, self.verdict, self._before, self._after
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
            "restarts": int(after.metrics["rtpurbo_engine_restarts_total"]),
            "resumed": int(after.metrics["rtpurbo_requests_resumed_total"]),
            "finished": verdict.counts["finished"],
            "left": verdict.counts["left"],
            "refusals": verdict.counts["refusals"],
            "lost": len(verdict.lost),
            "wrong": len(verdict.wrong),
            "unclean": len(verdict.unclean),
            "outage_seconds_median": _quantile(outages, 0.5),
            "outage_seconds_longest": _quantile(outages, 1.0),
            "rss_mib": [round(rest.footprint.rss_mib, 1) for rest in (before, after)],
            "descriptors": [rest.footprint.descriptors for rest in (before, after)],
            "passed": verdict.passed,
        }


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
