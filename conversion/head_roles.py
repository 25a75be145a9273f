"""From needle scores to head roles: which query heads keep full context. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.errors import ConversionError

Scores = list[list[float]]  # [layer][query head]


@dataclass(frozen=True, slots=True)
class HeadRule:
    """How retrieval heads are chosen; heads are ranked over the whole model, not per layer.

    `share`: this share of all query heads (at least one).
    `mass`: if given, instead of `share`, the fewest heads whose scores add up to this share of
    the sum of all scores.
    `max_kv_heads`: if given, only heads of so many KV heads, those of the best heads, are kept.
    A KV head with any retrieval head keeps all its tokens, so this bounds the KV cache.
    """

    share: float = 0.15
    mass: float | None = None
    max_kv_heads: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConversionError(f"heads share must be in (0, 1], got {self.share}")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ConversionError(f"heads mass must be in (0, 1], got {self.mass}")
        if self.max_kv_heads is not None and self.max_kv_heads < 1:
            raise ConversionError(f"max KV heads must be at least 1, got {self.max_kv_heads}")

    def describe(self) -> dict[str, Any]:
        """The rule as JSON."""
        return {"share": self.share, "mass": self.mass, "max_kv_heads": self.max_kv_heads}


def mean_scores(documents: list[Scores]) -> Scores:
    """Mean over documents, per layer and head."""
    return [
        [sum(values) / len(values) for values in zip(*heads, strict=True)]
        for heads in zip(*documents, strict=True)
    ]


def choose_heads(scores: Scores, rule: HeadRule, group_size: int) -> list[list[int]]:
    """Retrieval heads per layer, ascending. Equal scores: the earlier layer and head first."""
    ranked = sorted(
        ((layer, head) for layer, heads in enumerate(scores) for head in range(len(heads))),
        key=lambda place: -scores[place[0]][place[1]],
    )
    kept_kv: set[tuple[int, int]] = set()
    chosen: list[list[int]] = [[] for _ in scores]
    wanted = _count(ranked, scores, rule)
    for layer, head in ranked:
        kv = (layer, head // group_size)
        if kv not in kept_kv and rule.max_kv_heads == len(kept_kv):
            continue
        kept_kv.add(kv)
        chosen[layer].append(head)
        wanted -= 1
        if not wanted:
            break
    return [sorted(heads) for heads in chosen]


def _count(ranked: list[tuple[int, int]], scores: Scores, rule: HeadRule) -> int:
    if rule.mass is None:
        return max(1, round(rule.share * len(ranked)))
    total, reached = sum(map(sum, scores)), 0.0
    for count, (layer, head) in enumerate(ranked, start=1):
        reached += scores[layer][head]
        if reached >= rule.mass * total:
            return count
    return len(ranked)


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
