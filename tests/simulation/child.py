"""An engine process without a process: the real loop, turned by a task, behind the real frames.

A turn of the loop takes no time while it runs; what its step costs is added to the core's clock,
and the next turn begins when that time has come. Reports are on their way for a while, so a crash
can catch them there: those that left first may still arrive, the others never do.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from functools import partial

from engine.batch import Batch
from engine.child_protocol import ChildEndedError
from engine.core import IDLE_SECONDS, EngineCore
from engine.errors import CheckpointError
from engine.ipc import FrameError, decode_from_engine, decode_to_engine, encode
from engine.kv_pools import KvPools
from engine.messages import (
    Abort,
    EngineInfo,
    Failed,
    FromEngine,
    Ready,
    Report,
    Shutdown,
    ToEngine,
)
from engine.scheduler import Scheduler
from engine.step_note import StepNote
from tests.engine.fake_runner import SINKS, WINDOW
from tests.engine.toy_info import toy_info
from tests.simulation.history import History
from tests.simulation.loop import Signal
from tests.simulation.scenario import CrashPoint, LifePlan, Scenario
from tests.simulation.toy_model import HungError, KilledError, SimulatedRunner

BLOCK = 4  # tokens per page
CLOSE_SECONDS = 0.4  # until a killed process is gone; other things happen meanwhile
MOST_TURNS = 400  # in which some request must end: the oldest gets on in every step that fits
Wire = deque[tuple[float, list[bytes]]]  # when it arrives, and what


def make_pools(scenario: Scenario, kind: type[KvPools] = KvPools) -> KvPools:
    """The pools of the scenario's size; tests name a kind with a known fault."""
    return kind(
        full_pages=scenario.full_pages,
        window_pages=scenario.window_pages,
        block_tokens=BLOCK,
        window_tokens=WINDOW,
        sink_tokens=SINKS,
        prefix_caching=scenario.prefix_caching,
        cache_generated=scenario.cache_generated,
    )


class SimulatedChild:
    """Implements `engine.child_protocol.Child`.

    Tests put loops and schedulers with known faults in the place of the real ones.
    """

    make_core: type[EngineCore] = EngineCore
    make_scheduler: type[Scheduler] = Scheduler

    def __init__(self, number: int, scenario: Scenario, history: History, pools: KvPools) -> None:
        self.pid = number
        self.closed = False
        self._life = scenario.lives[number] if number < len(scenario.lives) else LifePlan()
        self._scenario = scenario
        self._history = history
        self._rng = random.Random(scenario.seed * 1009 + number)
        self._loop = asyncio.get_running_loop()
        self._ahead = 0.0  # seconds that the turn under way has taken
        self._device_free = 0.0  # when the newest step is done
        self._turns = -1  # with work
        self._to_engine: Wire = deque()
        self._reports: Wire = deque()
        self._sent = [0, 0]  # messages to and from the engine
        self._arrived, self._inbox = Signal(self._loop), Signal(self._loop)
        self._ended: str | None = None
        self._aborted: set[int] = set()
        self._busy = False
        self._turns_without_end = 0
        self._stopping = False
        self.info = toy_info(
            block_tokens=BLOCK,
            full_pages=scenario.full_pages,
            window_pages=scenario.window_pages,
            max_num_seqs=scenario.max_num_seqs,
        )
        self.scheduler = self.make_scheduler(
            pools,
            max_num_seqs=scenario.max_num_seqs,
            max_batch_tokens=scenario.max_batch_tokens,
            max_step_seconds=scenario.max_step_seconds,
        )
        runner = SimulatedRunner(self.info, self._before_execute)
        runner.memory = scenario.memory
        self._note: StepNote | None = None  # as the front end sees it
        self._noted: StepNote | None = None
        self._core = self.make_core(
            self.scheduler,
            runner,
            _CoreChannel(self),
            self._core_clock,
            self._take_note,
            look_ahead=scenario.look_ahead,
        )
        self._task = asyncio.ensure_future(self._live())
        history.note("engine %d: starts as %s", number, self._life)

    # The front end's side.

    def send(self, message: ToEngine) -> None:
        frames = encode(message)
        if self._life.bad_frame == (self._sent[0], "to engine"):
            frames = self._damaged(frames)
        self._sent[0] += 1
        self._to_engine.append((self._loop.time() + self._scenario.latency, frames))
        self._inbox.wake()

    async def receive(self, silence: float) -> FromEngine | None:
        deadline = self._loop.time() + silence
        while True:
            now = self._loop.time()
            if self._reports and self._reports[0][0] <= now:
                return self._take_report()
            if not self._reports and self._ended is not None:
                raise ChildEndedError(f"engine process {self._ended}")
            if now >= deadline:
                return None
            next_report = self._reports[0][0] if self._reports else deadline
            await self._arrived.wait(min(next_report, deadline))

    async def wait_ready(self, silence: float) -> EngineInfo:
        message = await self.receive(silence)
        if isinstance(message, Failed):
            raise CheckpointError(message.message)
        if not isinstance(message, Ready):
            raise ChildEndedError("engine was not ready in time")
        return message.info

    def step(self) -> StepNote | None:
        return self._note

    async def shut_down(self, seconds: float) -> None:
        self.send(Shutdown())
        await asyncio.wait({self._task}, timeout=seconds)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.sleep(CLOSE_SECONDS)
        await asyncio.wait({self._task})
        self.closed = True

    # The engine's side.

    async def _live(self) -> None:
        """From launch to the end of the process, however it comes."""
        try:
            await self._load()
            while not self._stopping:
                if not self._busy:
                    await self._rest()
                self._core.turn()
                await asyncio.sleep(self._ahead)
                self._ahead = 0.0
                self._note = self._noted
        except HungError:
            self._history.note("engine %d: hangs", self.pid)
            await asyncio.get_running_loop().create_future()
        except KilledError:
            self._end("was killed by signal 9")
        except asyncio.CancelledError:
            raise
        except FrameError as error:
            self._end(f"ended with exit code 1: {error}")
        except RuntimeError as error:
            self._end(f"ended with exit code 1: {error}")
        except BaseException as error:
            self._history.violation(f"engine {self.pid}: {type(error).__name__}: {error}")
            self._end("ended with exit code 1")
        else:
            self._end("ended with exit code 0")

    async def _load(self) -> None:
        fault = self._life.load_fault
        if fault == "hang":
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(self._life.load_seconds)
        if fault == "crash":
            raise KilledError
        if fault == "refusal":
            self.leave(Failed("the folder is gone", kind="checkpoint"))
            await asyncio.get_running_loop().create_future()
        self.leave(Ready(self.info))

    async def _rest(self) -> None:
        """What the real channel does: wait for a message, but not for ever."""
        until = self._loop.time() + IDLE_SECONDS
        while not self._to_engine and self._loop.time() < until:
            await self._inbox.wait(until)
        if self._to_engine:
            await asyncio.sleep(self._to_engine[0][0] - self._loop.time())

    def _end(self, how: str) -> None:
        """The process is gone: of what is on its way, the first part arrives."""
        keep = self._rng.randint(0, len(self._reports))
        lost = len(self._reports) - keep
        while len(self._reports) > keep:
            self._reports.pop()
        self._ended = how
        self._note = self._noted
        self._history.note("engine %d: %s; %d reports lost", self.pid, how, lost)
        self._arrived.wake()

    def _core_clock(self) -> float:
        return self._loop.time() + self._ahead

    def _take_note(self, note: StepNote | None) -> None:
        """A step stays noted until the time that it takes has passed."""
        self._noted = note
        if note is not None:
            self._note = note

    def inbox(self) -> list[ToEngine]:
        """Messages that have arrived; a turn begins."""
        if self._busy or self._to_engine:
            self._turns += 1
        self._crash_at("receive")
        messages: list[ToEngine] = []
        while self._to_engine and self._to_engine[0][0] <= self._loop.time():
            message = decode_to_engine(self._to_engine.popleft()[1])
            if isinstance(message, Abort):
                self._aborted.update(message.request_ids)
            messages.append(message)
            self._stopping = self._stopping or isinstance(message, Shutdown)
        return messages

    def leave(self, message: FromEngine) -> None:
        """A message of the engine goes on its way; a turn ends."""
        self._crash_at("before send")
        if isinstance(message, Report):
            self._look_at(message)
        frames = encode(message)
        if self._life.bad_frame == (self._sent[1], "from engine"):
            frames = self._damaged(frames)
        self._sent[1] += 1
        self._reports.append((self._core_clock() + self._scenario.latency, frames))
        self._arrived.wake()
        self._crash_at("after send")

    def _look_at(self, report: Report) -> None:
        """What must hold for every turn."""
        self._busy = report.stats.running + report.stats.waiting > 0
        self._turns_without_end += 1
        for update in report.updates:
            if update.finish_reason is not None:
                self._turns_without_end = 0
            if update.tokens and update.request_id in self._aborted:
                self._history.violation(f"{update.request_id} was aborted, but was computed")
        if not self._busy or self._aborted:
            self._turns_without_end = 0
        if self._turns_without_end > MOST_TURNS:
            raise AssertionError(f"no request ended in {MOST_TURNS} turns")

    def _take_report(self) -> FromEngine:
        try:
            return decode_from_engine(self._reports.popleft()[1])
        except FrameError as error:
            raise ChildEndedError(f"engine sent a bad frame: {error}") from error

    def _before_execute(self, batch: Batch) -> Callable[[], None]:
        """The device takes steps one after another; its faults show when one is started."""
        scenario = self._scenario
        seconds = scenario.step_seconds + scenario.token_seconds * batch.num_tokens
        if self._life.slow is not None and self._life.slow[0] == self._turns:
            seconds += self._life.slow[1]
        self._device_free = max(self._device_free, self._core_clock()) + seconds
        self._crash_at("before execute")
        if self._life.hang == self._turns:
            raise HungError
        return partial(self._after_execute, self._device_free)

    def _after_execute(self, done: float) -> None:
        self._ahead = max(self._ahead, done - self._loop.time())
        self._crash_at("after execute")

    def _crash_at(self, point: CrashPoint) -> None:
        if self._life.crash == (self._turns, point):
            self._history.note("engine %d: crashes, %s, turn %d", self.pid, point, self._turns)
            raise KilledError

    def _damaged(self, frames: list[bytes]) -> list[bytes]:
        """Damage that no reader can mistake for another message."""
        self._history.note("engine %d: a frame is damaged", self.pid)
        damage = self._rng.randrange(3)
        if damage == 0:
            return [frames[0], frames[1][:-1], *frames[2:]]
        if damage == 1:
            return frames[:1]
        return [b"RTPB\x63\x00" + frames[0][6:], *frames[1:]]


class _CoreChannel:
    """Implements `engine.core.Channel` on a child."""

    def __init__(self, child: SimulatedChild) -> None:
        self._child = child

    def receive(self, timeout: float) -> list[ToEngine]:
        return self._child.inbox()

    def send(self, message: FromEngine) -> None:
        self._child.leave(message)
