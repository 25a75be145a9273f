"""The engine process: what the front end starts, from the launch message to its last turn."""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from collections.abc import Callable

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.ipc import EngineChannel
from engine.launch import die_with_parent, read_launch
from engine.log_lines import log_lines
from engine.messages import Failed, Ready
from engine.step import Channel, EngineParts

logger = logging.getLogger(__name__)


def run_engine(build: Callable[[EngineConfig], EngineParts]) -> int:
    """Be the engine process that the parent's launch message asks for; returns the exit code.

    SIGINT and SIGTERM reach the whole process group (Ctrl-C, systemd), while the front end wants
    to drain: it alone decides when this process ends, and its own death ends it too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    try:
        launch = read_launch(sys.stdin.buffer)
    except EngineError as error:
        print(f"rtpurbo engine: {error}", file=sys.stderr)
        return 2
    die_with_parent()
    with log_lines(launch.config.log_format, "engine") as log:
        channel = EngineChannel(launch.folder)
        try:
            parts = _load(build, launch.config, channel)
            if parts is None:
                return 1
            core = EngineCore(
                parts.scheduler,
                parts.runner,
                channel,
                note=channel.note,
                dropped_lines=lambda: log.dropped,
            )
            core.run()
        finally:
            channel.close()
    return 0


def _load(
    build: Callable[[EngineConfig], EngineParts], config: EngineConfig, channel: Channel
) -> EngineParts | None:
    """Build the parts and say Ready; or say in one line why not."""
    try:
        parts = build(config)
    except ConfigError as error:
        channel.send(Failed(_one_line(error), kind="config"))
    except CheckpointError as error:
        channel.send(Failed(_one_line(error), kind="checkpoint"))
    except Exception as error:
        logger.exception("the engine cannot start")
        channel.send(Failed(f"{type(error).__name__}: {_one_line(error)}"))
    else:
        channel.send(Ready(parts.runner.info))
        return parts
    return None


def build_engine(config: EngineConfig) -> EngineParts:
    """The real thing. Torch is imported here, after the process is tied to its parent."""
    from engine.loading import load_engine_parts

    return load_engine_parts(config)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(run_engine(build_engine))
