"""Spans of ended requests, sent to an OpenTelemetry collector. Needs the extra `tracing`.

    POST /v1/completions      server span with the GenAI attributes of the semantic conventions
    ├── admission             head, body, validation, tokenising
    └── queue, prefill, decode    of each choice, by the engine's clock

Spans are made when a request has ended, from its record, so nothing of this is on its path: making
them takes microseconds, and a thread sends them from a queue with an end. Spans that find no place,
or no collector, are lost. The library's own OTEL_* variables hold (headers, resource attributes).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.request_record import OTHER, ChoiceAccount, RequestRecord

MAX_QUEUED_SPANS = 4096
MAX_CHOICES = 8  # of one request that get spans of their own
SEND_SECONDS = 5.0  # between two sends


class Tracing:
    """Exports the requests of one server. A client's `traceparent` decides whether it is sampled;
    without one it is."""

    def __init__(self, exporter: SpanExporter, model_name: str, send_seconds: float) -> None:
        """`send_seconds` pass between two sends."""
        self._model = model_name
        self._propagator = TraceContextTextMapPropagator()
        service = {"service.name": "rtpurbo", "service.version": version("rtpurbo")}
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON),
            resource=Resource.create(service),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUED_SPANS,
                schedule_delay_millis=send_seconds * 1000,
            )
        )
        self._tracer = self._provider.get_tracer("rtpurbo")

    @classmethod
    def to_collector(cls, endpoint: str, model_name: str) -> Tracing:
        """Traces by OTLP over HTTP to `endpoint`, for example http://collector:4318."""
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
        return cls(exporter, model_name, SEND_SECONDS)

    def export(self, record: RequestRecord) -> None:
        """Make the spans of a request that has just ended, and note its trace in the record.

        Probes, scrapes and other small questions have none, unless their client traces them.
        """
        if record.method != "POST" and not record.trace_headers:
            return
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract(record.trace_headers),
            kind=SpanKind.SERVER,
            start_time=_epoch(record.arrived),
            attributes=dict(self._attributes(record)),
        )
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        if record.error_code is not None:
            span.set_attribute("error.type", record.error_code)
        if record.status >= 500 or (record.error_code is not None and record.status < 400):
            span.set_status(Status(StatusCode.ERROR))
        self._phases(record, span)
        span.end()

    def close(self, seconds: float) -> None:
        """Send what waits, for `seconds` at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(seconds)

    def _attributes(self, record: RequestRecord) -> Iterator[tuple[str, Any]]:
        yield "http.request.method", "_OTHER" if record.method == OTHER else record.method
        yield "http.route", record.route
        yield "http.response.status_code", record.status
        yield "rtpurbo.request_id", record.request_id
        if record.wanted is None:
            return
        wanted, params = record.wanted, record.wanted.params
        yield "gen_ai.operation.name", wanted.operation
        yield "gen_ai.provider.name", "rtpurbo"
        yield "gen_ai.request.model", self._model
        yield "gen_ai.request.stream", wanted.stream
        yield "gen_ai.request.max_tokens", params.max_tokens
        yield "gen_ai.request.temperature", params.temperature
        yield "gen_ai.request.top_p", params.top_p
        yield "gen_ai.request.choice.count", len(record.choices)
        yield "gen_ai.response.id", wanted.completion_id
        yield "gen_ai.response.model", self._model
        yield "gen_ai.response.finish_reasons", [choice.reason for choice in record.choices]
        yield "gen_ai.usage.input_tokens", record.usage.get("prompt_tokens", 0)
        yield "gen_ai.usage.output_tokens", record.usage.get("generated_tokens", 0)
        yield "gen_ai.usage.cache_read.input_tokens", record.usage.get("cached_tokens", 0)
        for name, key in (
            ("gen_ai.response.time_to_first_chunk", "time_to_first_token_seconds"),
            ("rtpurbo.attended_tokens_mean", "attended_tokens_mean"),
            ("rtpurbo.attended_fraction", "attended_fraction"),
        ):
            value = record.timings.get(key)
            if value is not None:
                yield name, value

    def _phases(self, record: RequestRecord, parent: Span) -> None:
        if record.admitted is None:
            return
        context = set_span_in_context(parent)
        self._child("admission", context, record.arrived, record.admitted)
        for index, choice in enumerate(record.choices[:MAX_CHOICES]):
            begin = record.admitted
            for name, seconds in _phases_of(choice):
                self._child(name, context, begin, begin + seconds, {"rtpurbo.choice": index})
                begin += seconds

    def _child(
        self,
        name: str,
        context: Context,
        begin: float,
        end: float,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        span = self._tracer.start_span(
            name, context=context, start_time=_epoch(begin), attributes=attributes
        )
        span.end(_epoch(end))


def _phases_of(choice: ChoiceAccount) -> Iterator[tuple[str, float]]:
    """The phases that were begun, in order, in seconds; they follow each other without a gap."""
    timing = choice.timing
    for name, seconds in (
        ("queue", timing.queue),
        ("prefill", timing.prefill),
        ("decode", timing.decode),
    ):
        if seconds is not None:
            yield name, seconds


def _epoch(moment: float) -> int:
    """Nanoseconds since 1970 of a time.monotonic moment, by today's difference of the clocks."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
