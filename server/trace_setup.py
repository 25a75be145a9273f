"""Tracing for as long as a server runs, if it is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.errors import ConfigError
from server.config import ServerConfig
from server.recorder import Observer

FLUSH_SECONDS = 3.0  # at the end; a collector that is down costs no more


@contextmanager
def tracing(config: ServerConfig) -> Iterator[Sequence[Observer]]:
    """Who is to be told of requests so that they are traced: nobody without an endpoint.

    Raises:
        ConfigError: the extra is not installed.
    """
    if config.otlp_endpoint is None:
        yield ()
        return
    try:
        from server.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: {error.name} is missing; tracing needs pip install 'rtpurbo[tracing]'"
        ) from None
    traces = Tracing.to_collector(config.otlp_endpoint, config.model_name)
    try:
        yield (traces.export,)
    finally:
        traces.close(FLUSH_SECONDS)
