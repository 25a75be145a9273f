"""Faults from outside: signals to the engine process and garbage on its sockets."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import zmq

from benchmarks.process_watch import engine_of

READY_POLL = 0.1  # seconds
# What may happen, and how often beside the others.
STRIKES = {
    "kill": 4,
    "hang": 1,  # stopped for good; the supervisor must notice
    "pause": 1,  # stopped for less than a second
    "garbage to requests": 1,  # the engine reads it
    "garbage to reports": 1,  # the front end reads it
    "sockets unlinked": 1,  # connections that stand go on
}
HARMLESS = ("pause", "sockets unlinked")
GARBAGE = [b"RTPB\x63\x00\x00\x00", b"\xc0"]  # a frame of another version


class Nemesis:
    """Strikes whenever the server is ready, after a random pause, until it is told to stop."""

    def __init__(
        self, url: str, front_end: int, seed: int, least_pause: float, mean_pause: float
    ) -> None:
        """Pauses are seconds from the server's being ready to the next strike: the least, and what
        comes on top of it on average."""
        self.strikes: Counter[str] = Counter()
        self.engines: set[int] = set()  # ids of all engine processes seen
        self.folders: set[Path] = set()  # of their sockets
        self.outages: list[float] = []  # seconds from a strike to the next readiness
        self._url = url
        self._front_end = front_end
        self._rng = random.Random(seed)
        self._least_pause = least_pause
        self._mean_pause = mean_pause
        self._folder = Path()  # of the newest engine's sockets

    async def run(self, seconds: float) -> None:
        """Strike for so long; the last engine is left alone."""
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=self._url, timeout=10) as client:
            while True:
                await self._until_ready(client, None)
                pause = self._least_pause + self._rng.expovariate(1 / self._mean_pause)
                if time.monotonic() + pause > end:
                    return
                await asyncio.sleep(pause)
                engine = engine_of(self._front_end)
                if engine is not None:
                    await self._strike(client, engine)

    async def _strike(self, client: httpx.AsyncClient, engine: psutil.Process) -> None:
        """One fault, and the wait until the server has got over it."""
        began = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            self._remember(engine)
            name = self._rng.choices(list(STRIKES), list(STRIKES.values()))[0]
            if "garbage" in name and not (self._folder / "requests").exists():
                name = "kill"  # their names are gone, so nobody can write to these sockets
            self.strikes[name] += 1
            if name == "kill":
                engine.send_signal(signal.SIGKILL)
            elif name == "hang":
                engine.send_signal(signal.SIGSTOP)
            elif name == "pause":
                engine.send_signal(signal.SIGSTOP)
                await asyncio.sleep(self._rng.uniform(0.1, 0.6))
                engine.send_signal(signal.SIGCONT)
            elif name == "sockets unlinked":
                for file in ("requests", "reports"):
                    (self._folder / file).unlink(missing_ok=True)
            else:
                _send_garbage(self._folder / name.rpartition(" ")[2])
            if name not in HARMLESS:
                await self._until_ready(client, engine)
                self.outages.append(time.monotonic() - began)

    async def _until_ready(self, client: httpx.AsyncClient, lost: psutil.Process | None) -> None:
        """Until the server is ready, with another engine than the one that is lost."""
        while True:
            with suppress(httpx.TransportError, psutil.NoSuchProcess):
                engine = engine_of(self._front_end)
                is_another = engine is not None and engine != lost
                if is_another and (await client.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(READY_POLL)

    def _remember(self, engine: psutil.Process) -> None:
        """The engine's process, and the folder that its sockets lie in."""
        self.engines.add(engine.pid)
        for connection in engine.net_connections("unix"):
            if Path(connection.laddr or "").name == "requests":
                self._folder = Path(connection.laddr).parent
                self.folders.add(self._folder)


def _send_garbage(path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.setsockopt(zmq.LINGER, 1000)
        sender.connect(f"ipc://{path}")
        sender.send_multipart(GARBAGE)
