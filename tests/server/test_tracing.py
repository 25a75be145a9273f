"""Spans of requests: names, times, parents; and that no collector can hold up an answer."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from engine.errors import ConfigError
from server.config import ServerConfig
from server.request_record import RequestRecord
from server.trace_setup import tracing
from server.tracing import MAX_CHOICES, Tracing
from tests.server.live_server import LiveServer, live_server

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass(slots=True)
class Traced:
    """A server whose spans are kept here."""

    server: LiveServer
    exporter: InMemorySpanExporter
    records: list[RequestRecord] = field(default_factory=list)

    def spans(self, count: int) -> list[ReadableSpan]:
        """The next spans, once there are so many; they leave in batches, after their request."""
        self.server.until(lambda: len(self.exporter.get_finished_spans()) >= count)
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        assert len(found) == count
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    traces = Tracing(exporter, "toy", send_seconds=0.02)
    records: list[RequestRecord] = []
    folder = tmp_path_factory.mktemp("model")
    with live_server(folder, observers=[traces.export, records.append]) as server:
        yield Traced(server, exporter, records)
    traces.close(10)


@pytest.fixture
def traced(shared: Traced) -> Iterator[Traced]:
    yield shared
    shared.server.call(shared.server.engine.running.set)
    shared.exporter.clear()
    shared.records.clear()


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_is_a_span_with_its_phases(traced: Traced) -> None:
    """The toy engine makes up its phases: 1 ms, 0.5 s, and 10 ms for each further token."""
    before = time.time_ns()
    answer = traced.server.post(prompt="abc", max_tokens=4, ignore_eos=True, temperature=0.5)
    spans = {span.name: span for span in traced.spans(5)}
    root = spans.pop("POST /v1/completions")
    assert root.kind is SpanKind.SERVER
    assert before <= (root.start_time or 0) <= (root.end_time or 0) <= time.time_ns()
    assert list(spans) == ["admission", "queue", "prefill", "decode"]
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
    assert [seconds(spans[n]) for n in ("queue", "prefill", "decode")] == pytest.approx(
        [0.001, 0.5, 0.03], abs=1e-4
    )
    assert abs((spans["queue"].end_time or 0) - (spans["prefill"].start_time or 0)) < 1e5  # ns
    attributes = dict(root.attributes or {})
    assert attributes["gen_ai.response.id"] == answer.json()["id"]
    assert attributes["rtpurbo.request_id"] == answer.headers["x-request-id"]
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    usage = answer.json()["usage"]
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 4
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert root.resource.attributes["service.name"] == "rtpurbo"
    assert traced.records[0].trace_id == f"{root.context.trace_id:032x}", "the log line has it"


def test_names_are_those_of_the_conventions(traced: Traced) -> None:
    known = {getattr(gen_ai_attributes, name) for name in dir(gen_ai_attributes) if name.isupper()}
    operations = {item.value for item in gen_ai_attributes.GenAiOperationNameValues}
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        traced.server.post(path, **body, max_tokens=3, ignore_eos=True)
        (root,) = (s for s in traced.spans(5) if s.kind is SpanKind.SERVER)
        names = {name for name in root.attributes or {} if name.startswith("gen_ai.")}
        assert len(names) > 10
        assert names <= known
        assert (root.attributes or {})["gen_ai.operation.name"] in operations


def test_a_clients_trace_goes_on(traced: Traced) -> None:
    def ask(traceparent: str) -> None:
        httpx.get(traced.server.url + "/v1/models", headers={"traceparent": traceparent})

    ask(f"00-{TRACE}-{PARENT}-01")
    (span,) = traced.spans(1)
    assert span.parent is not None
    assert f"{span.context.trace_id:032x} {span.parent.span_id:016x}" == f"{TRACE} {PARENT}"
    ask(f"00-{TRACE}-{PARENT}-00")  # not sampled: no span, but the log line still has its id
    traced.server.until(lambda: len(traced.records) == 2)
    assert traced.records[1].trace_id == TRACE
    ask("no trace at all")
    (span,) = traced.spans(1)
    assert span.parent is None


def test_probes_and_scrapes_are_not_traced(traced: Traced) -> None:
    for path in ("/health/live", "/health/ready", "/metrics", "/nowhere"):
        httpx.get(traced.server.url + path)
    traced.server.post("/tokenize", prompt="a")
    (span,) = traced.spans(1)
    assert span.name == "POST /tokenize"


def test_failures_say_why(traced: Traced) -> None:
    traced.server.post(prompt="a", temperature=9)
    (span,) = traced.spans(1)
    assert (span.attributes or {})["error.type"] == "invalid_value"
    assert span.status.status_code is StatusCode.UNSET, "the client is at fault, not the server"
    traced.server.call(traced.server.engine.running.clear)
    traced.server.post(prompt="a", timeout_seconds=0.1, stream=True)
    (root,) = (span for span in traced.spans(2) if span.kind is SpanKind.SERVER)
    assert (root.attributes or {})["error.type"] == "deadline_exceeded"
    assert root.status.status_code is StatusCode.ERROR


def test_many_choices_have_few_spans(traced: Traced) -> None:
    traced.server.post(prompt="a", n=20, max_tokens=1, ignore_eos=True)
    traced.spans(2 + 3 * MAX_CHOICES)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A stub that takes OTLP over HTTP as a real one does: its address, and what it got."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    stub = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=stub.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{stub.server_address[1]}", got
    stub.shutdown()
    stub.server_close()
    thread.join(10)


def config_of(folder: Path, endpoint: str) -> ServerConfig:
    flags = {"model": folder, "model_name": "toy", "otlp_endpoint": endpoint}
    return ServerConfig.resolve(flags, folder)


def test_spans_reach_a_collector(
    tmp_path: Path, collector: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    """What waits at the end is sent too."""
    endpoint, got = collector
    with (
        tracing(config_of(tmp_path, endpoint + "/")) as observers,
        live_server(tmp_path, observers=observers) as server,
    ):
        server.post(prompt="abc", max_tokens=3, ignore_eos=True)
    names = {
        span.name
        for request in got
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert names == {"POST /v1/completions", "admission", "queue", "prefill", "decode"}


@pytest.mark.parametrize("listens", [False, True], ids=["down", "silent"])
def test_a_lost_collector_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.setattr("server.trace_setup.FLUSH_SECONDS", 0.1)
    monkeypatch.setattr("server.tracing.SEND_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        if not listens:
            taken.close()
        with tracing(config_of(tmp_path, endpoint)) as observers:
            with live_server(tmp_path, observers=observers) as server:
                body = {"prompt": "a", "max_tokens": 2}
                with httpx.Client(base_url=server.url, timeout=20) as client:
                    for _ in range(20):
                        assert client.post("/v1/completions", json=body).status_code == 200
            begun = time.monotonic()
        assert time.monotonic() - begun < 5


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "server.tracing", raising=False)
    with (
        pytest.raises(ConfigError, match=r"^otlp_endpoint: .* pip install 'rtpurbo\[tracing\]'$"),
        tracing(config_of(tmp_path, "http://collector:4318")),
    ):
        pass


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://", "ftp://a", "http://a b", ""])
def test_a_bad_endpoint_is_one_line(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"^otlp_endpoint: [^\n]*$"):
        config_of(tmp_path, endpoint)
