"""One engine process and its channel, from launch to the end of both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from engine.child_protocol import ChildEndedError
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.ipc import FrontEndChannel
from engine.launch import Launch, encode_launch
from engine.messages import EngineInfo, Failed, FromEngine, Ready, Shutdown, ToEngine
from engine.step_note import StepNote

logger = logging.getLogger(__name__)

_LAST_WORDS = 0.2  # seconds without a message after which an ended process has none left
_REAP_SECONDS = 30.0  # for a killed process to go; one that waits for a broken device may not
_ERRORS: dict[str, type[EngineError]] = {
    "engine": EngineError,
    "config": ConfigError,
    "checkpoint": CheckpointError,
}


class EngineChild:
    """Implements `engine.child_protocol.Child` with a process of its own.

    Made by `launch`; `close` must follow in every case.
    """

    def __init__(self, process: asyncio.subprocess.Process, channel: FrontEndChannel) -> None:
        self._process = process
        self._channel = channel
        self._exited = asyncio.ensure_future(process.wait())
        self._incoming = asyncio.ensure_future(channel.receive())

    @classmethod
    async def launch(cls, config: EngineConfig, module: str = "engine.child_main") -> EngineChild:
        """Start `python -m module`; output goes where ours goes. Raises EngineError.

        Tests name a module that puts a fake model behind the same loop.
        """
        try:
            channel = FrontEndChannel()
        except OSError as error:
            raise EngineError(f"cannot make the engine's sockets: {error.strerror}") from error
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module),
                stdin=asyncio.subprocess.PIPE,
                env=_child_environment(),
            )
        except BaseException as error:
            channel.close()
            if isinstance(error, OSError):
                raise EngineError(f"cannot start a process: {error.strerror}") from error
            raise
        child = cls(process, channel)
        assert process.stdin is not None
        process.stdin.write(encode_launch(Launch(config=config, folder=channel.folder)))
        with contextlib.suppress(ConnectionError):  # it ended already: `receive` will say so
            await process.stdin.drain()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; never waits, also when the process is gone."""
        self._channel.send(message)

    async def receive(self, silence: float) -> FromEngine | None:
        """The next message, None after silence; raises ChildEndedError as the protocol says."""
        waiting = {self._incoming, self._exited}
        await asyncio.wait(waiting, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
        if not self._incoming.done():  # it may lie there unread: this loop was late, or its end won
            await asyncio.wait({self._incoming}, timeout=_LAST_WORDS)
        if self._incoming.done():
            return self._take_incoming()
        if self._exited.done():
            raise ChildEndedError(f"engine process {_describe_exit(self._exited.result())}")
        return None

    def step(self) -> StepNote | None:
        """The step under way, or that the process ended in."""
        return self._channel.step()

    async def wait_ready(self, silence: float) -> EngineInfo:
        """Wait until the model is loaded.

        Raises:
            EngineError: one line for the operator; ConfigError or CheckpointError where it is one.
        """
        message = await self.receive(silence)
        if message is None:
            raise ChildEndedError(f"engine process said nothing for {silence:g} s")
        if isinstance(message, Failed):
            raise _ERRORS[message.kind](message.message)
        if not isinstance(message, Ready):
            raise ChildEndedError(f"engine sent {type(message).__name__} before Ready")
        return message.info

    async def shut_down(self, seconds: float) -> None:
        """Ask the process to leave and give it `seconds`; `close` then makes sure."""
        if not self._exited.done():
            self.send(Shutdown())
            await asyncio.wait({self._exited}, timeout=seconds)

    async def close(self) -> None:
        """Kill the process if it lives, reap it, and remove the channel."""
        if not self._exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await asyncio.wait({self._exited}, timeout=_REAP_SECONDS)
        if not self._exited.done():
            logger.error("engine process %d does not end although it was killed", self.pid)
            self._exited.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._incoming.cancel()
        await asyncio.wait({self._incoming})
        if not self._incoming.cancelled():
            self._incoming.exception()  # looked at: nobody reads this message any more
        self._channel.close()

    def _take_incoming(self) -> FromEngine:
        done = self._incoming
        error = done.exception()
        if error is not None:
            raise ChildEndedError(f"engine sent a bad frame: {error}") from error
        self._incoming = asyncio.ensure_future(self._channel.receive())
        return done.result()


def _child_environment() -> dict[str, str]:
    """Ours, with the folder of this package findable.

    The child runs with -P: the working folder is not searched for modules, so nothing that lies
    in a model folder can be imported in place of a library.

    OpenMP's threads wait without spinning: decode steps are many small parallel regions, and where
    another process wants a core, spinning made a token more than ten times as slow.
    """
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _describe_exit(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
