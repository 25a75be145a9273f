"""Requests as bytes, and the status of an answer in bytes."""

from __future__ import annotations

import json
from typing import Any


def raw_post(path: str, **body: Any) -> bytes:
    content = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def get(path: str, *lines: str, body: bytes = b"") -> bytes:
    head = [f"GET {path} HTTP/1.1", "Host: localhost", *lines, "", ""]
    return "\r\n".join(head).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])
