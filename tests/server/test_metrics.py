"""Series that dashboards rely on: names, types, labels, and real values behind them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import metrics_page
from server.metrics import FINISH_REASONS, REJECTIONS
from tests.server.live_server import LiveServer, live_server
from tests.server.metrics_series import scrape, value

HISTOGRAMS = """request_queue_seconds request_prefill_seconds request_decode_seconds
time_to_first_token_seconds inter_token_latency_seconds request_duration_seconds
request_prompt_tokens request_generated_tokens attended_tokens attended_fraction
http_request_duration_seconds""".split()
GAUGES = """layer_attended_fraction requests_running requests_waiting kv_cache_usage_ratio
prefill_tokens_remaining seconds_since_engine_step engine_up kv_bytes_per_token retrieval_heads
attention_heads kv_cache_pages kv_cache_bytes kv_cache_free_tokens requests_prefilling
prefill_progress_ratio oldest_request_age_seconds max_model_len max_sequences block_tokens
window_tokens build_info scrape_seconds engine_features_off""".split()
COUNTERS = """prompt_tokens generated_tokens prefix_cache_hit_tokens requests_finished
requests_rejected preemptions engine_restarts requests_resumed engine_steps engine_step_seconds
decode_attended_tokens decode_context_tokens kv_bytes_read kv_bytes_read_dense index_bytes_read
http_requests request_unknown_fields""".split()


pytestmark = pytest.mark.usefixtures("fresh_pages")


def test_every_documented_series_is_there(server: LiveServer) -> None:
    families = scrape(server)
    for names, kind in ((HISTOGRAMS, "histogram"), (GAUGES, "gauge"), (COUNTERS, "counter")):
        for name in names:
            family = families[f"rtpurbo_{name}"]
            assert family.type == kind, name  # type: ignore[attr-defined]
            for sample in family.samples:  # type: ignore[attr-defined]
                assert sample.labels["model_name"] == "toy"


def test_reasons_have_a_rate_from_the_start(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        families = scrape(server)
    for name, reasons in (("finished", FINISH_REASONS), ("rejected", REJECTIONS)):
        samples = families[f"rtpurbo_requests_{name}"].samples  # type: ignore[attr-defined]
        assert {sample.labels["reason"] for sample in samples} == {*reasons, "other"}
        assert {sample.value for sample in samples} == {0.0}


def codes_in(source: str) -> Iterator[str]:
    """The error codes that a module can answer with, where they are written out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("invalid", "ApiError"):
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            third = node.args[2:3] if ast.unparse(node.func) == "invalid" else []
            yield from (
                argument.value
                for argument in (*given, *third)
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def test_every_error_code_has_a_series() -> None:
    """A new code of an answer belongs into REJECTIONS, else it is counted as `other`."""
    files = Path(metrics_page.__file__).parent.rglob("*.py")
    assert {code for file in files for code in codes_in(file.read_text())} <= set(REJECTIONS)


def test_what_is_refused_below_the_application_is_counted_too(server: LiveServer) -> None:
    series = {"route": "unmatched", "method": "other", "status": "400"}
    before = value(server, "rtpurbo_http_requests_total", **series)
    rejected = value(server, "rtpurbo_requests_rejected_total", reason="invalid_http")
    assert b" 400 " in server.send(b"this is no HTTP\r\n\r\n")
    assert value(server, "rtpurbo_http_requests_total", **series) == before + 1
    assert value(server, "rtpurbo_requests_rejected_total", reason="invalid_http") == rejected + 1


def test_http_requests_are_counted_by_route_template(server: LiveServer) -> None:
    """A path that nobody serves, a method that a route does not take and an odd one included."""
    calls = [
        ("GET", "/v1/models/toy", ("/v1/models/{model_id:path}", "GET", "200")),
        ("GET", "/v1/models/x/y", ("/v1/models/{model_id:path}", "GET", "404")),
        ("GET", "/v1/completions", ("/v1/completions", "GET", "405")),
        ("BREW", "/scan-1", ("unmatched", "other", "404")),
    ]
    for method, path, labels in calls:
        series = dict(zip(("route", "method", "status"), labels, strict=True))
        before = value(server, "rtpurbo_http_requests_total", **series)
        httpx.request(method, server.url + path)
        server.until(
            lambda series=series, before=before: (  # type: ignore[misc]
                value(server, "rtpurbo_http_requests_total", **series) == before + 1
            )
        )


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"content-type": "text/plain"}, "unsupported_media_type"),
        ({"host": "a b"}, "invalid_host"),
    ],
    ids=["media-type", "host"],
)
def test_what_the_edge_refuses_is_counted(
    server: LiveServer, headers: dict[str, str], reason: str
) -> None:
    """Only what reached a route was."""
    before = value(server, "rtpurbo_requests_rejected_total", reason=reason)
    answer = httpx.post(server.url + "/v1/completions", content=b"{}", headers=headers)
    assert answer.is_client_error
    server.until(
        lambda: value(server, "rtpurbo_requests_rejected_total", reason=reason) == before + 1
    )


def test_a_finished_request_is_accounted_once(server: LiveServer) -> None:
    def counts() -> dict[str, float]:
        return {
            name: value(server, f"rtpurbo_{name}")
            for name in (
                "request_prompt_tokens_sum",
                "request_generated_tokens_sum",
                "request_prefill_seconds_count",
                "attended_fraction_count",
            )
        }

    before = counts()
    server.post(prompt="abc", max_tokens=5, ignore_eos=True, n=2)
    expected = {
        "request_prompt_tokens_sum": 6.0,
        "request_generated_tokens_sum": 10.0,
        "request_prefill_seconds_count": 2.0,
        "attended_fraction_count": 2.0,
    }
    server.until(lambda: {key: now - before[key] for key, now in counts().items()} == expected)


def test_gaps_between_tokens_are_accounted(server: LiveServer) -> None:
    """How many depends on how many tokens each update brought, so only that there are some."""
    name = "rtpurbo_inter_token_latency_seconds_count"
    before = value(server, name)
    server.post(prompt="abc", max_tokens=60, ignore_eos=True)
    server.until(lambda: value(server, name) > before)


def test_reasons_of_the_end(server: LiveServer) -> None:
    def finished(reason: str) -> float:
        return value(server, "rtpurbo_requests_finished_total", reason=reason)

    before = finished("stop")
    script = server.engine.scripts
    script[tuple(server.tokenizer.encode("p"))] = server.tokenizer.encode("abc")
    server.post(prompt="p", stop="b", max_tokens=9)
    server.until(lambda: finished("stop") == before + 1)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
def test_a_deadline_and_a_lost_engine_are_not_counted_as_aborts(
    server: LiveServer, streamed: bool
) -> None:
    def finished(reason: str) -> float:
        return value(server, "rtpurbo_requests_finished_total", reason=reason)

    before = {reason: finished(reason) for reason in ("deadline", "engine_lost", "abort")}
    server.call(server.engine.running.clear)
    server.post(prompt="a", timeout_seconds=0.1, stream=streamed)
    server.until(lambda: finished("deadline") == before["deadline"] + 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.post, prompt="a", stream=streamed)
        server.until(lambda: bool(server.engine.live))
        server.call(server.engine.fail_all)
        waiting.result()
    server.until(lambda: finished("engine_lost") == before["engine_lost"] + 1)
    assert finished("abort") == before["abort"]


def test_gauges_follow_the_engine(server: LiveServer) -> None:
    assert value(server, "rtpurbo_engine_up") == 1
    assert value(server, "rtpurbo_layer_attended_fraction", layer="3") == 0.25
    assert value(server, "rtpurbo_kv_bytes_per_token", cache="dense") == 400
    assert value(server, "rtpurbo_engine_resident_bytes") > 2**20
    server.engine.pid = None
    assert value(server, "rtpurbo_engine_resident_bytes") == 0
    server.engine.state = "restarting"
    server.until(lambda: value(server, "rtpurbo_engine_up") == 0)


def test_v40_no_label_comes_from_a_client(server: LiveServer) -> None:
    def series() -> set[str]:
        page = httpx.get(server.url + "/metrics").text
        return {re.sub(r"\s.*", "", line) for line in page.splitlines() if line[:1] != "#"}

    def scan(i: int) -> None:
        label = {"x-request-id": f"label-{i}", "user-agent": f"scanner-{i}"}
        httpx.request(f"SCAN{i}", f"{server.url}/scan-{i}?q={i}", headers=label)
        httpx.get(f"{server.url}/v1/models/model-{i}", headers=label)
        body: dict[str, Any] = {"prompt": "a", f"field{i}": i}
        server.post(**body, user=f"user-{i}", model=f"model-{i}")

    def counted(count: float) -> bool:
        return value(server, "rtpurbo_requests_rejected_total", reason="model_not_found") >= count

    scan(0)
    server.until(lambda: counted(2))
    before = series()
    for i in range(1, 8):
        scan(i)
    server.until(lambda: counted(16))
    assert series() == before
