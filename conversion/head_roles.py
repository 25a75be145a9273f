"""From needle scores to head roles: which query heads keep full context. Torch-free.

Heads are chosen one by one, as in the paper, or as whole groups of a KV head. What a KV cache costs
is decided by KV heads: one with a single retrieval head keeps the keys and values of every token.
The best 15 % of the query heads of a model with 8 of them per KV head touch about half of its KV
heads, so half of the cache stays; 15 % of the KV heads keep 15 % of it. Groups are therefore ranked
by the sum of their heads' scores, the retrieval bought with one KV head's bytes, and all their
query heads retrieve: the bytes are kept anyway. With granularity query_head, `max_kv_heads` sets
the same bound and keeps only the heads that score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

from conversion.errors import ConversionError

Scores = list[list[float]]  # [layer][query head]
Granularity = Literal["query_head", "kv_head"]


@dataclass(frozen=True, slots=True)
class HeadRule:
    """How retrieval heads are chosen; they are ranked over the whole model, not per layer.

    `share`: this share of all query heads or KV heads (at least one).
    `mass`: if given, instead of `share`, the fewest whose scores add up to this share of the sum of
    all scores.
    `max_kv_heads`: if given, only heads of so many KV heads are kept: those of the best heads, or
    with the causal check those without which most is lost.
    """

    share: float = 0.15
    mass: float | None = None
    max_kv_heads: int | None = None
    granularity: Granularity = "query_head"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConversionError(f"heads share must be in (0, 1], got {self.share}")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ConversionError(f"heads mass must be in (0, 1], got {self.mass}")
        if self.max_kv_heads is not None and self.max_kv_heads < 1:
            raise ConversionError(f"max KV heads must be at least 1, got {self.max_kv_heads}")
        if self.granularity not in ("query_head", "kv_head"):
            raise ConversionError(
                f"heads granularity must be query_head or kv_head, got {self.granularity}"
            )

    def describe(self) -> dict[str, Any]:
        """The rule as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HeadUnit:
    """Query heads of one KV head that are chosen together, and the sum of their scores."""

    layer: int
    kv_head: int
    heads: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class ScoreSpread:
    """Needle scores over documents, each [layer][query head]."""

    mean: Scores
    deviation: Scores  # standard deviation over these documents
    least: Scores
    most: Scores

    @classmethod
    def of(cls, documents: Sequence[Scores]) -> ScoreSpread:
        layers = [list(zip(*heads, strict=True)) for heads in zip(*documents, strict=True)]
        return cls(
            mean=[[fmean(values) for values in heads] for heads in layers],
            deviation=[[pstdev(values) for values in heads] for heads in layers],
            least=[[min(values) for values in heads] for heads in layers],
            most=[[max(values) for values in heads] for heads in layers],
        )


def ranked_units(scores: Scores, rule: HeadRule, group_size: int) -> list[HeadUnit]:
    """What can be chosen, best first. Equal scores: the earlier layer and head first."""
    size = 1 if rule.granularity == "query_head" else group_size
    units = [
        HeadUnit(
            layer=layer,
            kv_head=first // group_size,
            heads=tuple(range(first, first + size)),
            score=sum(heads[first : first + size]),
        )
        for layer, heads in enumerate(scores)
        for first in range(0, len(heads), size)
    ]
    return sorted(units, key=lambda unit: -unit.score)


def unit_budget(ranked: Sequence[HeadUnit], rule: HeadRule) -> int:
    """How many units the rule keeps, KV heads left aside."""
    if rule.mass is None:
        return max(1, round(rule.share * len(ranked)))
    total, reached = sum(unit.score for unit in ranked), 0.0
    for count, unit in enumerate(ranked, start=1):
        reached += unit.score
        if reached >= rule.mass * total:
            return count
    return len(ranked)


def best_units(
    ranked: Sequence[HeadUnit], count: int, max_kv_heads: int | None = None
) -> list[HeadUnit]:
    """The first `count` of the units, without those that would take one KV head too many."""
    chosen: list[HeadUnit] = []
    for unit in ranked:
        wider = [*chosen, unit]
        if max_kv_heads is None or len(in_kv_heads(wider)) <= max_kv_heads:
            chosen = wider
        if len(chosen) == count:
            break
    return chosen


def in_kv_heads(units: Sequence[HeadUnit]) -> list[list[HeadUnit]]:
    """The units of each KV head that has any, KV heads and units in the order given."""
    parts: dict[tuple[int, int], list[HeadUnit]] = {}
    for unit in units:
        parts.setdefault((unit.layer, unit.kv_head), []).append(unit)
    return list(parts.values())


def heads_of(units: Sequence[HeadUnit], layers: int) -> list[list[int]]:
    """Query heads per layer, ascending."""
    chosen: list[list[int]] = [[] for _ in range(layers)]
    for unit in units:
        chosen[unit.layer] += unit.heads
    return [sorted(heads) for heads in chosen]


def choose_heads(scores: Scores, rule: HeadRule, group_size: int) -> list[list[int]]:
    """Retrieval heads per layer, ascending, by score alone."""
    ranked = ranked_units(scores, rule, group_size)
    chosen = best_units(ranked, unit_budget(ranked, rule), rule.max_kv_heads)
    return heads_of(chosen, len(scores))


def read_heads(path: Path, layers: int, heads: int) -> list[list[int]]:
    """The list `retrieval_heads` of a head file, which a person may have edited.

    Raises:
        ConversionError: not such a list; the message names the file.
    """
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))["retrieval_heads"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path}: no list retrieval_heads ({type(error).__name__})") from None
    if not isinstance(chosen, list) or len(chosen) != layers:
        raise ConversionError(f"{path}: retrieval_heads must list {layers} layers")
    for layer, row in enumerate(chosen):
        if not isinstance(row, list) or any(
            type(head) is not int or not 0 <= head < heads for head in row
        ):
            raise ConversionError(f"{path}: layer {layer} must list query heads below {heads}")
    if not any(chosen):
        raise ConversionError(f"{path}: retrieval_heads names no head")
    return [sorted(set(row)) for row in chosen]
