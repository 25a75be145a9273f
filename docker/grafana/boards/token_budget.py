"""How many tokens the retrieval heads attend, and what sparsity saves."""

from __future__ import annotations

from docker.grafana.boards.board import Board, Row
from docker.grafana.boards.panel import Panel, Query, Step, good_below
from docker.grafana.boards.promql import attended_share, mean, rate, saved, series, total
from docker.grafana.boards.shapes import lines, number, spread

SPARSE = f"avg({series('kv_bytes_per_token', cache='sparse')})"
DENSE = f"avg({series('kv_bytes_per_token', cache='dense')})"
BY_LAYER = Query(f"avg by (layer) ({series('layer_attended_fraction')})", "layer {{layer}}")

GLANCE = Row(
    "At a glance",
    (
        number(
            "Attended share", "Share of the context that retrieval heads attend in the decode "
            "steps of now. 100 % is dense attention: selection then costs and gains nothing.",
            "percentunit", attended_share(), steps=good_below(0.4, 0.6), width=4,
        ),
        number(
            "Tokens attended", "Tokens that a retrieval head attends in a decode step: the mean "
            "over the requests that ended.", "short", mean("attended_tokens"), width=4,
        ),
        number(
            "Reading saved", "Share of the KV bytes of dense decoding that are not read, the "
            "index keys of selection counted against it.", "percentunit", saved(), width=4,
            steps=(Step(None, "red"), Step(0.1, "orange"), Step(0.4, "green")),
        ),
        number(
            "Memory saved", "Share of a dense KV cache that one more token of context does not "
            "take; the window's fixed size comes on top.", "percentunit",
            f"1 - {SPARSE} / {DENSE}", width=4,
        ),
        number(
            "Retrieval heads", "Share of the query heads that see the whole context; all others "
            "see a window.", "percentunit",
            f"avg({series('retrieval_heads')} / {series('attention_heads')})", width=4,
        ),
        number(
            "Context that still fits", "Tokens for which the KV pools still have room, prefixes "
            "that are only kept for reuse given up.", "short", total("kv_cache_free_tokens"),
            width=4,
        ),
    ),
)  # fmt: skip

ATTENDED = Row(
    "What retrieval heads attend",
    (
        *spread(
            "Tokens attended", "Tokens attended per retrieval head and decode step, one value per "
            "request that ended.", "short", "attended_tokens",
        ),
        *spread(
            "Attended share of the context", "Attended tokens over context length, one value per "
            "request that ended. It falls as contexts grow; near 100 % selection gains nothing.",
            "percentunit", "attended_fraction", steps=(Step(None, "green"), Step(0.6, "orange")),
        ),
        lines(
            "Attended share by layer", "Moving mean per layer with retrieval heads. A layer far "
            "above the others has an indexer that does not separate.", "percentunit",
            BY_LAYER, maximum=1,
        ),
        Panel(
            kind="bargauge", title="Attended share by layer, now", unit="percentunit",
            text="The last value of each layer, side by side.", queries=(BY_LAYER,),
            minimum=0, maximum=1, steps=good_below(0.4, 0.6),
        ),
    ),
)  # fmt: skip

SAVING = Row(
    "What decoding reads",
    (
        lines(
            "KV bytes read", "Bytes per second that decode steps read, stacked: selected tokens, "
            "whole contexts of retrieval heads under dense_below, windows, and index keys.", "Bps",
            Query(rate("kv_bytes_read_total", "kind"), "{{kind}}"),
            Query(rate("index_bytes_read_total"), "index keys"), stacked=True,
        ),
        lines(
            "Against dense attention", "What is read, all kinds together, beside what full "
            "attention in every head would have read in the same steps.", "Bps",
            Query(f"{rate('kv_bytes_read_total')} + {rate('index_bytes_read_total')}", "read"),
            Query(rate("kv_bytes_read_dense_total"), "dense"),
        ),
        lines(
            "Reading saved", "Share of the bytes of dense decoding that are not read. It grows "
            "with the context: windows and selections do not.", "percentunit",
            Query(saved(), "saved"), maximum=1,
        ),
        lines(
            "Cost of selection", "Index keys read in order to select, as a share of all that is "
            "read. If it is most of it, a smaller index_dim or a higher dense_below pays.",
            "percentunit",
            Query(
                f"{rate('index_bytes_read_total')} / ({rate('kv_bytes_read_total')} + "
                f"{rate('index_bytes_read_total')})", "index keys",
            ), maximum=1,
        ),
    ),
)  # fmt: skip


def pool(name: str, text: str) -> Panel:
    """Bytes of one pool by state; the stack is as high as the pool is large."""
    query = Query(f"sum by (state) ({series('kv_cache_bytes', pool=name)})", "{{state}}")
    return lines(f"{name.capitalize()} pool", text, "bytes", query, stacked=True)  # fmt: skip


POOLS = Row(
    "KV pools",
    (
        pool("full", "Bytes of the pool that grows with the context: held by sequences, kept for "
             "prefixes (given up on demand), free."),
        pool("window", "Bytes of the pool that grows with the number of sequences: held by "
             "sequences, kept for prefixes (given up on demand), free."),
        lines(
            "Context that still fits", "Tokens of context that the pools still take. When it "
            "reaches the length of a prompt, that prompt waits.", "short",
            Query(series("kv_cache_free_tokens"), "{{instance}}"),
        ),
        lines(
            "KV bytes per token", "What one more token of context costs, as it is served and if "
            "every head kept every token.", "bytes",
            Query(SPARSE, "sparse"), Query(DENSE, "dense"), logarithmic=True,
        ),
    ),
)  # fmt: skip

TOKEN_BUDGET = Board(
    uid="rtpurbo-token-budget",
    title="rtpurbo: token budget",
    text="How many tokens the retrieval heads attend, and what that saves over dense attention.",
    rows=(GLANCE, ATTENDED, SAVING, POOLS),
)
