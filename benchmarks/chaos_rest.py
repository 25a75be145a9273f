"""The server of a chaos run at rest, before the faults and after, and what it leaves behind."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import psutil

from benchmarks.chaos_checker import Verdict
from benchmarks.chaos_nemesis import Nemesis
from benchmarks.process_watch import Footprint, footprint, read_metrics
from benchmarks.server_process import ServerProcess

SETTLE_SECONDS = 60.0  # in which a server without work must come to rest
MORE_MIB = 24.0  # by which the front end's memory may be larger at the end
HELD = (  # series that are 0 at rest
    "rtpurbo_requests_running",
    "rtpurbo_requests_waiting",
    "rtpurbo_kv_cache_usage_ratio",
)


@dataclass(frozen=True, slots=True)
class Rest:
    """A server without work, or one that did not come to rest in `SETTLE_SECONDS`."""

    footprint: Footprint  # of the front end
    metrics: dict[str, float]  # by name, summed over labels

    @classmethod
    async def of(cls, server: ServerProcess) -> Rest:
        """Wait until the server says that it has nothing to do, and look."""
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            values = await asyncio.to_thread(read_metrics, server.url)
            if not any(values[name] for name in HELD) and values["rtpurbo_engine_up"]:
                break
            await asyncio.sleep(0.3)
        await asyncio.sleep(1.0)  # connections that were closed are gone on both sides
        return cls(footprint(server.pid), read_metrics(server.url))


def check_at_rest(before: Rest, after: Rest, verdict: Verdict) -> None:
    """Note what the server holds after the faults and did not hold before."""
    expect, old, new = verdict.expect, before.footprint, after.footprint
    for name in HELD:
        expect(f"{name} is {after.metrics[name]:g} at rest", after.metrics[name] == 0)
    expect(
        f"descriptors: {old.descriptors} before, {new.descriptors} after",
        new.descriptors <= old.descriptors,
    )
    expect(f"threads: {old.threads} before, {new.threads} after", new.threads <= old.threads)
    expect(
        f"memory: {old.rss_mib:.0f} MiB before, {new.rss_mib:.0f} after",
        new.rss_mib <= old.rss_mib + MORE_MIB,
    )


def check_nothing_is_left(server: ServerProcess, nemesis: Nemesis, verdict: Verdict) -> None:
    """Note what the server has left behind; it has ended."""
    code = server.process.returncode
    verdict.expect(f"the server ended with code {code}", code == 0)
    orphans = sorted(pid for pid in nemesis.engines if psutil.pid_exists(pid))
    verdict.expect(f"engine processes {orphans} still live", not orphans)
    folders = sorted(str(path) for path in nemesis.folders if path.exists())
    verdict.expect(f"folders {folders} are left", not folders)
