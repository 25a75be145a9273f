"""What is known of one HTTP request when it ends: for metrics, the log line and the spans.

The outermost layer makes the record and puts it into the scope's state; whoever learns something
writes it down. Numbers and words of ours only, but for the client's own label of the request.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request
from starlette.types import Scope

from engine.messages import Attended, Timing
from engine.request import SamplingParams

UNMATCHED = "unmatched"  # the route of a path that nobody serves
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; metrics and log do
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
OTHER = "other"

Operation = Literal["text_completion", "chat"]


@dataclass(slots=True, kw_only=True)
class ChoiceAccount:
    """How one generation ended. Times are monotonic seconds."""

    reason: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    generated_tokens: int
    timing: Timing  # by the engine's clock
    attended: Attended
    first_token: float | None = None  # when it reached the front end
    resumes: int = 0  # engine processes that it outlived

    @property
    def prefill_ended(self) -> bool:
        """Whether the prompt was computed to its end."""
        return self.timing.decode is not None or self.reason in ("stop", "length")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asked of the engine."""

    operation: Operation
    completion_id: str
    stream: bool
    params: SamplingParams  # of the first choice


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request from its head to the end of its answer."""

    method: str  # one of METHODS, or OTHER
    arrived: float = field(default_factory=time.monotonic)  # seconds
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # ours, never the client's
    label: str | None = None  # the client's X-Request-Id
    route: str = UNMATCHED  # template
    status: int = CLIENT_CLOSED_REQUEST  # until an answer begins
    trace_headers: dict[str, str] = field(default_factory=dict)  # traceparent and tracestate
    trace_id: str | None = None  # of requests that are traced
    admitted: float | None = None  # time.monotonic() seconds, of requests that reached the engine
    error_code: str | None = None  # also of an error that came as an event of a stream
    wanted: Wanted | None = None  # of requests that were admitted
    choices: list[ChoiceAccount] = field(default_factory=list)  # when they have ended
    usage: dict[str, int] = field(default_factory=dict)  # prompt, cached and generated tokens
    timings: dict[str, float | None] = field(default_factory=dict)  # the answer's `metrics`


def record_of(source: Request | Scope) -> RequestRecord:
    """The record that travels with a request."""
    scope = source.scope if isinstance(source, Request) else source
    record: RequestRecord = scope["state"]["record"]
    return record
