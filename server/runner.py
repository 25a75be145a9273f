"""One server from start to end: bind, check, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from engine.child import EngineChild
from engine.child_protocol import LaunchChild
from engine.errors import ConfigError, EngineError
from engine.line_writer import LineWriter
from engine.log_lines import log_lines
from engine.model.checkpoint import preflight
from engine.process import EngineProcess
from engine.supervision import SupervisionPolicy
from engine.tokenizer import Tokenizer
from server.app import create_app
from server.config import ServerConfig
from server.connections import BACKLOG, affordable_connections
from server.http_protocol import LINGER_SECONDS, ProtocolLimits, limited_protocol
from server.info_api import LIVE, METRICS, READY
from server.memory_bounds import front_end_bounds, render_bounds
from server.recorder import Recorder
from server.trace_setup import tracing

logger = logging.getLogger(__name__)

DEAD_PEER_SECONDS = 120.0  # after which a peer that acknowledges nothing is gone
CLOSE_SECONDS = 3  # after draining, for last words to reach clients that read them


def run_server(
    config: ServerConfig,
    policy: SupervisionPolicy | None = None,
    launch: LaunchChild = EngineChild.launch,
) -> int:
    """Serve until a signal; returns the exit code.

    Args:
        config: the server's settings and the engine's.
        policy: of supervision; None: as the settings say.
        launch: starts the engine; tests put another one behind the same server.

    Raises:
        EngineError: one line; the settings, the address or the model folder are not usable, or the
            engine was lost too often.
    """
    dead_peer_seconds = max(DEAD_PEER_SECONDS, 2 * config.slow_reader_seconds)
    listener = bind(config.host, config.port, dead_peer_seconds)
    try:
        preflight(config.model)
        tokenizer = Tokenizer.from_folder(config.model)
        loop_factory = uvicorn.Config("", loop="uvloop", log_config=None).get_loop_factory()
        with (
            log_lines(config.log_lines, "front end") as output,
            tracing(config) as observers,
            asyncio.Runner(loop_factory=loop_factory) as runner,
        ):
            output.write(f"rtpurbo settings\n{config.describe()}")
            engine = EngineProcess(
                config.engine(),
                max_queued_requests=config.max_queued_requests,
                max_queued_prefill_tokens=config.max_queued_prefill_tokens,
                policy=policy if policy is not None else config.supervision(),
                launch=launch,
            )
            app = create_app(engine, tokenizer, config, lambda: output.dropped, observers)
            return runner.run(_serve(config, engine, app, listener, output))
    finally:
        listener.close()


def bind(host: str, port: int, dead_peer_seconds: float = DEAD_PEER_SECONDS) -> socket.socket:
    """A listening address, taken before the model is loaded so that a conflict shows at once.

    Raises:
        ConfigError: one line that says why not.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_dead_peers(listener, dead_peer_seconds)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    listener.set_inheritable(False)
    return listener


def _notice_dead_peers(listener: socket.socket, seconds: float) -> None:
    """Options that accepted sockets inherit: a peer without power or network closes nothing.

    The last one also ends a connection whose peer lets nothing in for `seconds`, so it has to be
    longer than a slow reader is borne.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 30),  # seconds of silence before the first probe
        (socket.TCP_KEEPINTVL, 10),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, int(seconds * 1000)),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


async def _serve(
    config: ServerConfig,
    engine: EngineProcess,
    app: Recorder,
    listener: socket.socket,
    output: LineWriter,
) -> int:
    """Answer health probes from the first moment, requests once the model is loaded."""
    port = listener.getsockname()[1]
    server = _Server(_uvicorn_config(config, app))
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(_load(engine, config, port, output))
    stopping = asyncio.create_task(stop.wait())
    dying = asyncio.create_task(engine.wait_dead())
    try:
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            ends = {stopping, serving, dying}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise EngineError(f"the engine is given up: {dying.result()}")
            await _drain(engine, config.drain_seconds, stop_now)
    finally:
        loading.cancel()
        stopping.cancel()
        dying.cancel()
        await engine.stop()  # what still runs ends with an error event
        server.should_exit = True
        await serving
    return 0


async def _drain(engine: EngineProcess, seconds: float, stop_now: asyncio.Event) -> None:
    """Let running requests end, until the time is up or a second signal comes."""
    tasks = [asyncio.create_task(engine.drain(seconds)), asyncio.create_task(stop_now.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _load(engine: EngineProcess, config: ServerConfig, port: int, output: LineWriter) -> None:
    """Start the engine and tell the operator what was made of the settings."""
    await engine.start()
    output.write(f"memory plan\n{engine.info.plan}")
    bounds = front_end_bounds(config, engine.info)
    output.write(f"front end, at most\n{render_bounds(bounds)}")
    address = f"[{config.host}]" if ":" in config.host else config.host
    output.write(
        f"serving {config.model_name} ({engine.info.attention} attention, {engine.info.device}, "
        f"{engine.info.dtype}) on http://{address}:{port}"
    )


def _uvicorn_config(config: ServerConfig, app: Recorder) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited_protocol(
            ProtocolLimits(
                max_header_bytes=config.max_header_bytes,
                max_connections=affordable_connections(config.max_connections),
                max_connections_per_client=config.max_connections_per_client,
                header_seconds=config.header_seconds,
                body_seconds=config.body_seconds,
                # A stream gives up first, and accounts why.
                reader_seconds=config.slow_reader_seconds + LINGER_SECONDS,
                probes=(LIVE, READY, METRICS),
            ),
            app.refused,
        ),
        backlog=BACKLOG,
        ws="none",
        lifespan="off",
        loop="uvloop",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=config.idle_seconds,  # type: ignore[arg-type]  # fractions work too
        timeout_graceful_shutdown=CLOSE_SECONDS,
        h11_max_incomplete_event_size=config.max_header_bytes,
    )


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: draining comes before closing."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
