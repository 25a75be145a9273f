"""A streamed answer of the live server, event by event."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.server.live_server import LiveServer


def stream(server: LiveServer, path: str = "/v1/completions", **body: Any) -> list[Any]:
    """Events of a stream: parsed data, "[DONE]", and comments as they are."""
    events: list[Any] = []
    with httpx.stream(
        "POST", server.url + path, json={**body, "stream": True}, timeout=20
    ) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
            elif line:
                events.append(line)
    return events


def texts(events: list[Any]) -> dict[int, str]:
    """The text of each choice, joined."""
    joined: dict[int, str] = {}
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else []:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined
