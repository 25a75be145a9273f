"""Series that dashboards rely on: names, types, labels, and real values behind them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import metrics_page
from tests.server.live_server import LiveServer

HISTOGRAMS = """request_queue_seconds request_prefill_seconds request_decode_seconds
time_to_first_token_seconds inter_token_latency_seconds request_duration_seconds
request_prompt_tokens request_generated_tokens attended_tokens attended_fraction
http_request_duration_seconds""".split()
GAUGES = """layer_attended_fraction requests_running requests_waiting kv_cache_usage_ratio
prefill_tokens_remaining seconds_since_engine_step engine_up kv_bytes_per_token retrieval_heads
attention_heads kv_cache_pages kv_cache_bytes kv_cache_free_tokens requests_prefilling
prefill_progress_ratio oldest_request_age_seconds max_model_len max_sequences block_tokens
window_tokens build_info scrape_seconds""".split()
COUNTERS = """prompt_tokens generated_tokens prefix_cache_hit_tokens requests_finished
requests_rejected preemptions engine_restarts requests_resumed engine_steps engine_step_seconds
decode_attended_tokens decode_context_tokens kv_bytes_read kv_bytes_read_dense index_bytes_read
http_requests request_unknown_fields""".split()


@pytest.fixture(autouse=True)
def fresh_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scrape renders, so that a test never starts from the page of the one before it."""
    monkeypatch.setattr(metrics_page, "CACHE_SECONDS", 0.0)


def scrape(server: LiveServer) -> dict[str, object]:
    page = httpx.get(server.url + "/metrics", timeout=20)
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(page.text)}


def value(server: LiveServer, name: str, **labels: str) -> float:
    families = scrape(server)
    for family in families.values():
        for sample in family.samples:  # type: ignore[attr-defined]  # the parser is untyped
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return 0.0


def test_every_documented_series_is_there(server: LiveServer) -> None:
    families = scrape(server)
    for names, kind in ((HISTOGRAMS, "histogram"), (GAUGES, "gauge"), (COUNTERS, "counter")):
        for name in names:
            family = families[f"rtpurbo_{name}"]
            assert family.type == kind, name  # type: ignore[attr-defined]
            for sample in family.samples:  # type: ignore[attr-defined]
                assert sample.labels["model_name"] == "toy"


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
    server.engine.state = "restarting"
    server.until(lambda: value(server, "rtpurbo_engine_up") == 0)


def test_v40_no_label_comes_from_a_client(server: LiveServer) -> None:
    def series() -> set[str]:
        page = httpx.get(server.url + "/metrics").text
        return {re.sub(r"\s.*", "", line) for line in page.splitlines() if line[:1] != "#"}

    server.post(prompt="a", temperature=9)
    httpx.get(server.url + "/nowhere")
    server.until(lambda: any("not_found" in name for name in series()))
    before = len(series())
    for i in range(30):
        httpx.get(f"{server.url}/scan-{i}")
        server.post(prompt="a", user=f"user-{i}", model=f"model-{i}")
    server.until(lambda: any("model_not_found" in name for name in series()))
    assert len(series()) <= before + 2


def test_f19_scrapes_close_together_share_one_page(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_page, "CACHE_SECONDS", 3600.0)
    pages = {httpx.get(server.url + "/metrics").text for _ in range(5)}
    assert len(pages) == 1
