"""The board to open first: is the server well, how fast is it, where is the time going."""

from __future__ import annotations

from docker.grafana.boards.board import Board, Row
from docker.grafana.boards.panel import Query, Step, good_below
from docker.grafana.boards.promql import (
    OF_CLIENTS,
    PROCESS,
    attended_share,
    increase,
    mean,
    quantile,
    rate,
    series,
    total,
)
from docker.grafana.boards.shapes import lines, number, spread

UP_OR_DOWN = (("0", "down"), ("1", "up"))
ENDS = (
    ("length", "blue"), ("stop", "green"), ("abort", "#8e8e8e"), ("slow_consumer", "purple"),
    ("deadline", "yellow"), ("error", "red"), ("engine_lost", "dark-red"), ("other", "orange"),
)  # fmt: skip
STATUSES = (("[123]..", "green"), ("429", "purple"), ("4..", "orange"), ("5..", "red"))
RED_AT_ZERO = (Step(None, "red"), Step(1, "green"))

HEALTH = Row(
    "Is it well?",
    (
        number(
            "Server", "Whether Prometheus can read the server's /metrics: the worst of the chosen "
            "instances. Down: runbook, server down.", "short",
            f"min(up{{{PROCESS}}})", steps=RED_AT_ZERO, words=UP_OR_DOWN,
        ),
        number(
            "Engine", "Whether the engine process takes work: the worst of the chosen instances. "
            "Down while it loads or is started again.", "short",
            f"min({series('engine_up')})", steps=RED_AT_ZERO, words=UP_OR_DOWN,
        ),
        number(
            "Last engine step", "Age of the engine loop's last sign of life. It stays under a few "
            "seconds, idle or not; more than a minute means that the engine hangs.", "s",
            f"max({series('seconds_since_engine_step')})", steps=good_below(10, 60),
        ),
        number(
            "Alerts firing", "Alerts of docker/prometheus/rules.yml that fire now; Prometheus "
            "names them under /alerts.", "short",
            'count(ALERTS{alertname=~"Rtpurbo.*",alertstate="firing"}) or vector(0)',
            steps=good_below(1, 3),
        ),
        number(
            "Answers with 5xx", "Share of HTTP answers that are the server's fault, 503 while it "
            "is not ready included; probes and scrapes are not. Runbook, requests fail.",
            "percentunit",
            f"({rate('http_requests_total', route=OF_CLIENTS, status='~5..')} or vector(0)) "
            f"/ {rate('http_requests_total', route=OF_CLIENTS)}", steps=good_below(0.001, 0.01),
        ),
        number(
            "First token, p99", "99 of 100 requests have their first token sooner, queue and "
            "prefill included. Long prompts move it: see the request phases board.", "s",
            quantile(0.99, "time_to_first_token_seconds"), steps=good_below(10, 60),
        ),
        number(
            "Between tokens, p99", "99 of 100 tokens follow the one before them sooner. Above "
            "0.2 s a reader notices.", "s", quantile(0.99, "inter_token_latency_seconds"),
            steps=good_below(0.2, 1),
        ),
        number(
            "Restarts, 1 h", "Engine processes started again within the hour. One is an incident, "
            "several are a pattern. Runbook, engine restarts.", "short",
            f"sum(increase({series('engine_restarts_total')}[1h]))", steps=good_below(1, 3),
        ),
        number("Requests ended", "Requests that ended per second, for whatever reason.", "reqps",
               rate("requests_finished_total")),
        number("Running", "Sequences in the engine's batch.", "short", total("requests_running")),
        number(
            "Waiting", "Sequences that wait for a slot or for pages. Minutes above zero mean that "
            "more is asked than this GPU gives.", "short", total("requests_waiting"),
            steps=good_below(1, 32),
        ),
        number(
            "Longest wait now", "Age of the sequence that has waited longest and is not computed "
            "yet; 0 when none waits.", "s",
            f"max({series('oldest_request_age_seconds', state='waiting')})",
            steps=good_below(10, 60),
        ),
        number("Tokens per second", "Tokens generated, all streams together.", "short",
               rate("generated_tokens_total")),
        number(
            "Attended share", "Share of the context that retrieval heads attend in decode steps. "
            "Near 100 % sparsity gains nothing: see the token budget board.", "percentunit",
            attended_share(), steps=good_below(0.4, 0.6),
        ),
        number(
            "Context that still fits", "Tokens for which the KV pools still have room, prefixes "
            "that are only kept for reuse given up.", "short", total("kv_cache_free_tokens"),
        ),
        number(
            "Preemptions, 1 h", "Sequences that lost their pages to others within the hour: work "
            "that is done twice. Runbook, KV cache full.", "short",
            f"sum(increase({series('preemptions_total')}[1h]))", steps=good_below(1, 100),
        ),
    ),
)  # fmt: skip

TRAFFIC = Row(
    "Traffic",
    (
        lines(
            "Requests ended", "Requests that ended per second, by reason: stop and length are good "
            "ends, abort is a client that left, slow_consumer one that did not read, deadline ran "
            "out; error and engine_lost are the server's fault.", "reqps",
            Query(rate("requests_finished_total", "reason"), "{{reason}}"), stacked=True,
            colors=ENDS,
        ),
        lines(
            "Requests refused", "Requests refused per second, by error code. queue_full means 429: "
            "add replicas or raise the queue; most others are mistakes of clients.", "reqps",
            Query(f"{rate('requests_rejected_total', 'reason')} > 0", "{{reason}}"), stacked=True,
        ),
        lines(
            "Tokens", "Tokens per second: prompt tokens computed, prompt tokens taken from the "
            "prefix cache, tokens generated. Mind the logarithmic axis.", "short",
            Query(rate("prompt_tokens_total"), "prompt, computed"),
            Query(rate("prefix_cache_hit_tokens_total"), "prompt, from cache"),
            Query(rate("generated_tokens_total"), "generated"), logarithmic=True,
        ),
        lines(
            "Running and waiting", "Sequences in the batch, those of them whose prompt is still "
            "being read, and sequences that wait.", "short",
            Query(total("requests_running"), "running"),
            Query(total("requests_prefilling"), "of these, in prefill"),
            Query(total("requests_waiting"), "waiting"),
        ),
        lines(
            "HTTP answers", "Answers to clients per second by status, without probes and scrapes. "
            "499 is a client that went away before its answer began.", "reqps",
            Query(f"{rate('http_requests_total', 'status', route=OF_CLIENTS)} > 0", "{{status}}"),
            stacked=True, colors=STATUSES,
        ),
        lines(
            "Lengths", "Mean tokens of the requests that ended: prompts and answers. A change of "
            "workload shows here before it shows in latency.", "short",
            Query(mean("request_prompt_tokens"), "prompt"),
            Query(mean("request_generated_tokens"), "generated"), logarithmic=True,
        ),
    ),
)  # fmt: skip

LATENCY = Row(
    "Latency",
    (
        *spread(
            "First token", "From a request's arrival to its first token: queue and prefill.", "s",
            "time_to_first_token_seconds",
        ),
        *spread(
            "Between tokens", "Time between two tokens of a stream; what a reader perceives as "
            "speed. A long prefill beside it shows here.", "s", "inter_token_latency_seconds",
        ),
        *spread(
            "Prefill", "From the first computation of a prompt to its first token; grows with the "
            "prompt.", "s", "request_prefill_seconds",
        ),
        *spread(
            "Decode", "From a request's first token to its last; grows with the answer.", "s",
            "request_decode_seconds",
        ),
    ),
)  # fmt: skip

CAPACITY = Row(
    "Capacity",
    (
        lines(
            "KV pools in use", "Share of the pages of each pool that sequences hold. Near 100 % is "
            "fine as long as nothing is preempted.", "percentunit",
            Query(f"max by (pool) ({series('kv_cache_usage_ratio')})", "{{pool}}"),
            steps=good_below(0.9, 0.97), maximum=1,
        ),
        lines(
            "Preemptions", "Sequences that lost their pages and are computed again, in each "
            "interval. They cost time twice: shorten the queue or grow the pools.", "short",
            Query(increase("preemptions_total"), "preemptions"),
        ),
        lines(
            "Prefix cache", "Share of prompt tokens that came from the prefix cache.",
            "percentunit",
            Query(
                f"{rate('prefix_cache_hit_tokens_total')} / ("
                f"{rate('prefix_cache_hit_tokens_total')} + {rate('prompt_tokens_total')})",
                "from cache",
            ), maximum=1,
        ),
        lines(
            "Front end", "Cores that the front end process uses, per instance. It has one for the "
            "event loop: near 1 it delays streams, however idle the GPU is.", "short",
            Query(f"rate(process_cpu_seconds_total{{{PROCESS}}}[$__rate_interval])",
                  "{{instance}}"), steps=good_below(0.7, 0.9),
        ),
    ),
)  # fmt: skip

ENGINE = Row(
    "Engine",
    (
        lines(
            "Sign of life", "Age of the engine loop's last sign of life, per instance.", "s",
            Query(series("seconds_since_engine_step"), "{{instance}}"), steps=good_below(10, 60),
        ),
        lines(
            "Restarts", "Engine processes started again, requests that went on in the next one, "
            "and requests that failed because they ended engines, in each interval.", "short",
            Query(increase("engine_restarts_total"), "restarts"),
            Query(increase("requests_resumed_total"), "requests resumed"),
            Query(increase("requests_poisoned_total"), "requests poisoned"),
        ),
        lines(
            "Without an engine", "Seconds in each interval for which clients saw a pause because "
            "an engine was lost, counted when the next one reports.", "s",
            Query(increase("engine_outage_seconds_sum"), "pause"),
        ),
        lines(
            "Log lines dropped", "Log lines lost in each interval, by process, because their "
            "reader was too slow or had gone.", "short",
            Query(increase("log_lines_dropped_total", "process"), "{{process}}"),
        ),
        lines(
            "Fast paths off", "What the engine does without since a request ended engines with it: "
            "1 CUDA graphs, 2 the attention kernels too. It stays until the next engine starts.",
            "short", Query(series("engine_features_off"), "{{instance}}"),
            steps=good_below(1, 2),
        ),
        lines(
            "Scrape", "Time that rendering /metrics takes, off the event loop.", "s",
            Query(series("scrape_seconds"), "{{instance}}"),
        ),
    ),
)  # fmt: skip

OVERVIEW = Board(
    uid="rtpurbo-overview",
    title="rtpurbo: overview",
    text="Is the server well, how fast is it, and where does the time go.",
    rows=(HEALTH, TRAFFIC, LATENCY, CAPACITY, ENGINE),
)
