"""`rtpurbo health`: what a container's health check asks, without curl or a shell."""

from __future__ import annotations

import http.client
import json
from typing import Annotated

import typer

from server.commands.failure import fail


def health(
    host: Annotated[
        str, typer.Option(envvar="RTPURBO_HOST", help="Address that the server listens on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="RTPURBO_PORT", help="Port that the server listens on.")
    ] = 8000,
    live: Annotated[
        bool, typer.Option("--live", help="Ask whether the process is up, not whether it is ready.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 4.0,
) -> None:
    """Exit with 0 if the server on this host takes work, with 1 and the reason if not."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(here, port, timeout=timeout)
    try:
        connection.request("GET", "/health/live" if live else "/health/ready")
        answer = connection.getresponse()
        status = json.loads(answer.read(4096))["status"]
    except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError) as error:
        fail(f"no answer from {here}:{port}: {error or type(error).__name__}")
    finally:
        connection.close()
    if answer.status != 200:
        fail(status)
    print(status)
