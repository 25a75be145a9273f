"""Which heads retrieve, and why they."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from conversion.report.contents import Contents
from conversion.report.facts import HeadScores, ModelFacts
from conversion.report.score_plot import RankedHead, ranked_heads
from conversion.report.section import (
    CONVERT,
    Block,
    Heading,
    Missing,
    Paragraph,
    Picture,
    Section,
    Table,
    counted,
)


def head_map_section(contents: Contents) -> Section:
    """Always there: the folder names its heads."""
    model = contents.model
    rows = [
        (
            str(layer),
            " ".join(map(str, heads)),
            " ".join(map(str, model.full_kv_heads[layer])),
        )
        for layer, heads in enumerate(model.retrieval_heads)
        if heads
    ]
    blocks: list[Block] = [
        Picture(
            "head-map.png",
            "Layers down, query heads across; retrieval heads are outlined. Lines part the groups "
            "that share a KV head.",
        ),
        Table(
            ("layer", "retrieval heads", "KV heads kept whole"),
            rows,
            f"Retrieval heads; {counted(model.layers - len(rows), 'layer')} without any",
            words=3,
        ),
        Table(
            ("context, tokens", "sparse, bytes a token", "dense, bytes a token", "share"),
            [
                (
                    f"{cost.length:,}",
                    f"{cost.sparse_bytes:,}",
                    f"{cost.dense_bytes:,}",
                    f"{cost.sparse_bytes / cost.dense_bytes:.1%}",
                )
                for cost in model.kv_costs
            ],
            "KV memory of one sequence in bfloat16, index keys and windows included",
            words=0,
        ),
    ]
    return Section("heads", "Head map", blocks)


def score_section(contents: Contents) -> Section:
    """Needle scores, if they are known."""
    title, heads = "Needle scores", contents.heads
    if heads is None:
        missing = Missing("No needle scores: this folder was not made by calibration.", CONVERT)
        return Section("scores", title, [missing])
    blocks: list[Block] = [
        Paragraph(_how(heads)),
        Picture(
            "scores.png",
            "Needle scores of all heads, best first; lines span the documents. The axis is "
            "logarithmic and ends at 0.0001.",
        ),
        _score_table(contents.model, heads),
    ]
    if heads.causal_check is not None:
        blocks += _causal_check(heads.causal_check)
    return Section("scores", title, blocks)


def _how(heads: HeadScores) -> str:
    parts = ["The share of a head's attention that lies on a repeated needle's first place"]
    if heads.documents is not None and heads.lengths:
        lengths = " and of ".join(f"{length:,} tokens" for length in heads.lengths)
        parts.append(f"over {counted(heads.documents, 'document')} of {lengths}")
    if heads.text is not None:
        parts.append(f"(text: {heads.text})")
    return " ".join(parts) + "." + _rule(heads.chosen_by)


def _rule(rule: Mapping[str, Any] | None) -> str:
    if rule is None:
        return ""
    told = ", ".join(f"{name} {value}" for name, value in rule.items() if value is not None)
    return f" Rule: {told}."


def _score_table(model: ModelFacts, heads: HeadScores) -> Table:
    chosen = [own for own in ranked_heads(model, heads) if own.chosen]
    return Table(
        ("layer", "head", "score", "deviation", "least", "most"),
        [tuple(_score_cells(own)) for own in chosen],
        "Scores of the retrieval heads over documents",
        words=0,
    )


def _score_cells(own: RankedHead) -> Iterator[str]:
    yield str(own.layer)
    yield str(own.head)
    for value in (own.score, own.deviation, own.least, own.most):
        yield "" if value is None else f"{value:.4f}"


def _causal_check(check: Mapping[str, Any]) -> Iterator[Block]:
    """Free-form JSON that calibration wrote."""
    yield Heading("Causal check")
    names = {
        "loss_dense": "all heads with full context",
        "loss_local": "none",
        "loss_kept": "the kept ones",
    }
    losses = ", ".join(f"{words} {check[key]}" for key, words in names.items() if key in check)
    note = check.get("note")
    yield Paragraph(
        f"Retrieval loss in nats per answer token: {losses}." + (f" {note}" if note else "")
    )
    columns = ("layer", "heads", "score", "loss_added_if_taken", "loss_saved_if_given", "kept")
    candidates = check.get("candidates")
    found = (
        [own for own in candidates if isinstance(own, dict)] if isinstance(candidates, list) else []
    )
    yield Table(
        [column.replace("_", " ") for column in columns],
        [[str(own.get(column, "")) for column in columns] for own in found],
        "Candidates: what limiting one head to the window costs, and what freeing it alone saves",
        words=0,
    )
