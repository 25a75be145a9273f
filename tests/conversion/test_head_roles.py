"""Choosing heads from scores, and reading a choice that a person may have edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conversion.errors import ConversionError
from conversion.head_roles import HeadRule, ScoreSpread, choose_heads, read_heads

SCORES = [[0.01, 0.02, 0.0, 0.03], [0.4, 0.05, 0.3, 0.0], [0.0, 0.09, 0.1, 0.0]]


@pytest.mark.parametrize(
    ("rule", "heads"),
    [
        (HeadRule(share=0.01), [[], [0], []]),  # at least one
        (HeadRule(share=0.25), [[], [0, 2], [2]]),  # ranked over the model, not per layer
        (HeadRule(share=1.0), [[0, 1, 2, 3]] * 3),
        (HeadRule(mass=0.4), [[], [0], []]),  # 0.40 of 1.00
        (HeadRule(mass=0.69), [[], [0, 2], []]),
        (HeadRule(mass=0.75), [[], [0, 2], [2]]),
        # KV heads hold two query heads: layer 1 heads 0-1 and 2-3 come first
        (HeadRule(share=0.34, max_kv_heads=2), [[], [0, 1, 2, 3], []]),
        (HeadRule(share=0.25, max_kv_heads=1), [[], [0, 1], []]),
        # whole groups, by the sum of their heads: 0.45, 0.30, 0.10, 0.09, 0.03, 0.03
        (HeadRule(share=0.15, granularity="kv_head"), [[], [0, 1], []]),
        (HeadRule(share=0.5, granularity="kv_head"), [[], [0, 1, 2, 3], [2, 3]]),
        (HeadRule(mass=0.7, granularity="kv_head"), [[], [0, 1, 2, 3], []]),
        (HeadRule(share=0.5, max_kv_heads=1, granularity="kv_head"), [[], [0, 1], []]),
    ],
    ids=str,
)
def test_heads_are_the_best_of_the_whole_model(rule: HeadRule, heads: list[list[int]]) -> None:
    assert choose_heads(SCORES, rule, group_size=2) == heads


def test_equal_scores_prefer_the_earlier_head() -> None:
    assert choose_heads([[0.5, 0.5], [0.5, 0.5]], HeadRule(share=0.5), 1) == [[0, 1], []]


def test_several_weak_heads_of_one_kv_head_outweigh_a_lone_one() -> None:
    """They cost the same bytes of cache and retrieve more."""
    scores = [[0.3, 0.0, 0.2, 0.2]]
    assert choose_heads(scores, HeadRule(share=0.5, granularity="kv_head"), 2) == [[2, 3]]
    assert choose_heads(scores, HeadRule(share=0.25), 2) == [[0]]


def test_scores_and_their_spread_over_documents() -> None:
    spread = ScoreSpread.of([[[0.0, 1.0]], [[0.5, 0.0]]])
    assert (spread.mean, spread.deviation) == ([[0.25, 0.5]], [[0.25, 0.5]])
    assert (spread.least, spread.most) == ([[0.0, 0.0]], [[0.5, 1.0]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "heads share must be in"),
        ({"share": 1.5}, "heads share must be in"),
        ({"mass": 0.0}, "heads mass must be in"),
        ({"max_kv_heads": 0}, "max KV heads must be at least 1"),
        ({"granularity": "layer"}, "granularity must be query_head or kv_head"),
    ],
)
def test_impossible_rules_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        HeadRule(**values)


def test_an_edited_choice_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"retrieval_heads": [[2, 0, 2], []], "remark": "mine"}))
    assert read_heads(path, layers=2, heads=4) == [[0, 2], []]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no list retrieval_heads"),
        ("[]", "no list retrieval_heads"),
        ("{}", "no list retrieval_heads"),
        ('{"retrieval_heads": [[0]]}', "must list 2 layers"),
        ('{"retrieval_heads": [[0], [4]]}', "layer 1 must list query heads below 4"),
        ('{"retrieval_heads": [[0], [true]]}', "layer 1 must list query heads below 4"),
        ('{"retrieval_heads": [[0], 1]}', "layer 1 must list query heads below 4"),
        ('{"retrieval_heads": [[], []]}', "names no head"),
    ],
)
def test_a_broken_choice_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ConversionError, match=message) as caught:
        read_heads(path, layers=2, heads=4)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
