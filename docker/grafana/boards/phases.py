"""Where a request's time goes: queue, prefill, decode."""

from __future__ import annotations

from docker.grafana.boards.board import Board, Row
from docker.grafana.boards.panel import Query, good_below
from docker.grafana.boards.promql import OF_CLIENTS, mean, quantile, rate, series, total
from docker.grafana.boards.shapes import lines, number, spread

NOW = Row(
    "Now",
    (
        number(
            "Oldest prefill", "Computed share of the prompt that has been under way for longest; "
            "100 % when none is. It moves long before a first token does.", "percentunit",
            f"min({series('prefill_progress_ratio')})", width=4,
        ),
        number(
            "Prefill to do", "Prompt tokens that live requests still have to compute.", "short",
            total("prefill_tokens_remaining"), width=4,
        ),
        number(
            "Longest wait now", "Age of the sequence that has waited longest and is not computed "
            "yet; 0 when none waits.", "s",
            f"max({series('oldest_request_age_seconds', state='waiting')})",
            steps=good_below(10, 60), width=4,
        ),
        number(
            "Oldest running", "Age of the running sequence that was admitted first.", "s",
            f"max({series('oldest_request_age_seconds', state='running')})", width=4,
        ),
        number("Running", "Sequences in the engine's batch.", "short", total("requests_running"),
               width=4),
        number("Waiting", "Sequences that wait for a slot or for pages.", "short",
               total("requests_waiting"), width=4, steps=good_below(1, 32)),
    ),
)  # fmt: skip

SHARES = Row(
    "Where the time goes",
    (
        lines(
            "Mean time per phase", "Mean seconds of the requests that ended, stacked: queue, "
            "prefill, decode. The whole is what a client waits for the last token.", "s",
            Query(mean("request_queue_seconds"), "queue"),
            Query(mean("request_prefill_seconds"), "prefill"),
            Query(mean("request_decode_seconds"), "decode"), stacked=True,
        ),
        lines(
            "Engine time by kind of step", "Share of the time that the engine spends in steps that "
            "only prefill, only decode, or do both. What is missing to 100 % is idle or overhead.",
            "percentunit",
            Query(
                f"avg by (phase) (rate({series('engine_step_seconds_total')}[$__rate_interval]))",
                "{{phase}}",
            ), stacked=True, maximum=1,
        ),
        lines(
            "Step time", "Mean duration of an engine step by kind. A decode step is the floor of "
            "the time between tokens; mixed steps raise it while prompts are read.", "s",
            Query(
                f"{rate('engine_step_seconds_total', 'phase')} / "
                f"{rate('engine_steps_total', 'phase')}", "{{phase}}",
            ), logarithmic=True,
        ),
        lines(
            "Steps", "Engine steps per second by kind.", "short",
            Query(rate("engine_steps_total", "phase"), "{{phase}}"), stacked=True,
        ),
        lines(
            "Oldest prefill", "Computed share of the prompt that has been under way for longest, "
            "per instance; 100 % when none is. A plateau below is a prefill that waits.",
            "percentunit", Query(series("prefill_progress_ratio"), "{{instance}}"), maximum=1,
        ),
        lines(
            "Prefill to do", "Prompt tokens that live requests still have to compute, per "
            "instance. The slope is the speed of prefill.", "short",
            Query(series("prefill_tokens_remaining"), "{{instance}}"),
        ),
        lines(
            "Ages", "Age of the sequence that has waited longest, and of the one that has run "
            "longest, over all instances.", "s",
            Query(f"max by (state) ({series('oldest_request_age_seconds')})", "{{state}}"),
        ),
        lines(
            "HTTP, p99 by route", "99 of 100 answers of a route were complete sooner; a stream "
            "lasts as long as its generation.", "s",
            Query(
                quantile(0.99, "http_request_duration_seconds", "route", route=OF_CLIENTS),
                "{{route}}",
            ),
            logarithmic=True,
        ),
    ),
)  # fmt: skip

PER_PHASE = Row(
    "Each phase",
    (
        *spread(
            "Queue", "From arrival to the first computation: waiting for a slot or for pages.",
            "s", "request_queue_seconds",
        ),
        *spread(
            "Prefill", "From the first computation to the first token; grows with the prompt.",
            "s", "request_prefill_seconds",
        ),
        *spread(
            "Decode", "From the first token to the last; grows with the answer.", "s",
            "request_decode_seconds",
        ),
        *spread(
            "Whole request", "From arrival to the end, whatever its reason.", "s",
            "request_duration_seconds",
        ),
    ),
)  # fmt: skip

PHASES = Board(
    uid="rtpurbo-phases",
    title="rtpurbo: request phases",
    text="Where a request's time goes: queue, prefill, decode; finished ones and live ones.",
    rows=(NOW, SHARES, PER_PHASE),
)
