"""The sparse sections of config.json: ours and RTP-LLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.model.config import SparseAttentionConfig
from tests.engine.model.config_case import read, refusal

HEADS = [[0, 5], [], [1]]  # of 3 layers with 6 query heads
SECTION: dict[str, Any] = {"format_version": 1, "retrieval_heads": HEADS}


def sparse(folder: Path, **changes: Any) -> SparseAttentionConfig:
    config = read(folder, rtpurbo={**SECTION, **changes})
    assert config.sparse is not None
    return config.sparse


def test_defaults_are_those_of_the_format(tmp_path: Path) -> None:
    assert sparse(tmp_path) == SparseAttentionConfig(
        retrieval_heads=((0, 5), (), (1,)),
        window_tokens=8192,
        sink_tokens=4,
        index_dim=16,
        index_scope="query_head",
        index_age_bias=False,
        block_tokens=64,
        top_p=((0.9, 0.9), (), (0.9,)),
        dense_below=0,
    )


@pytest.mark.parametrize(
    "value", [[0.5, 0.6, 0.7], [[0.5, 0.6], [], [0.7]]], ids=["flat", "by layer"]
)
def test_top_p_per_head(value: Any, tmp_path: Path) -> None:
    assert sparse(tmp_path, top_p=value).top_p == ((0.5, 0.6), (), (0.7,))


def test_all_fields_are_read(tmp_path: Path) -> None:
    config = sparse(
        tmp_path,
        window_tokens=512,
        sink_tokens=8,
        index_dim=None,
        index_scope="kv_head",
        block_tokens=8,
        top_p=1,
        dense_below=100,
        calibration={"scores": [[0.1]]},
    )
    assert (config.window_tokens, config.sink_tokens, config.block_tokens) == (512, 8, 8)
    assert (config.index_dim, config.index_scope, config.dense_below) == (None, "kv_head", 100)
    assert config.top_p == ((1.0, 1.0), (), (1.0,))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"retrieval_heads": None},
        {"retrieval_heads": [[0], [1]]},
        {"retrieval_heads": [[0], [6], []]},
        {"retrieval_heads": [[0], [-1], []]},
        {"retrieval_heads": [[5, 0], [], []]},
        {"retrieval_heads": [[0, 0], [], []]},
        {"retrieval_heads": [[True], [], []]},
        {"retrieval_heads": [0, 1, 2]},
        {"window_tokens": 0},
        {"window_tokens": 512.0},
        {"sink_tokens": -1},
        {"sink_tokens": 65},
        {"index_dim": 0},
        {"index_scope": "layer"},
        {"index_scope": None},
        {"index_age_bias": 1},
        {"index_age_bias": "true"},
        {"block_tokens": 48},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": None},
        {"top_p": [0.9, 0.9]},
        {"top_p": [[0.9], [0.9], [0.9]]},
        {"top_p": [[0.9, 0.9], 0.9]},
        {"dense_below": -1},
        {"window_size": 512},
    ],
    ids=lambda change: next(f"{key}={value!r}" for key, value in change.items()),
)
def test_a_wrong_section_is_refused_by_key(change: dict[str, Any], tmp_path: Path) -> None:
    (key,) = change
    message = refusal(tmp_path, rtpurbo={**SECTION, **change})
    assert message.startswith("rtpurbo.")
    assert key in message


def test_a_bias_by_age_is_an_indexers(tmp_path: Path) -> None:
    assert sparse(tmp_path, index_age_bias=True).index_age_bias
    message = refusal(tmp_path, rtpurbo={**SECTION, "index_age_bias": True, "index_dim": None})
    assert message == "rtpurbo.index_age_bias needs an indexer, but index_dim is null"


@pytest.mark.parametrize("key", ["rtpurbo", "headwise_config"])
def test_a_section_is_an_object(key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **{key: [1]}) == f"{key} must be an object"


def headwise(folder: Path, section: dict[str, Any]) -> SparseAttentionConfig:
    config = read(folder, headwise_config=section)
    assert config.sparse is not None
    return config.sparse


def test_headwise_config_loads_as_the_same_map_without_indexer(tmp_path: Path) -> None:
    flags = {"0": [1, 0, 0, 0, 0, 1], "2": [0, 1, 0, 0, 0, 0], "1": [0] * 6}
    numbers = {"sink_token_num": 2, "swa_token_num": 128, "seqlen_threshold": 256}
    assert headwise(tmp_path, {**flags, **numbers}) == SparseAttentionConfig(
        retrieval_heads=((0, 5), (), (1,)),
        window_tokens=128,
        sink_tokens=2,
        index_dim=None,
        top_p=((1.0, 1.0), (), (1.0,)),
        dense_below=256,
    )


def test_headwise_layers_that_are_not_listed_keep_every_head(tmp_path: Path) -> None:
    config = headwise(tmp_path, {"1": [0, 0, 1, 0, 0, 0]})
    assert config.retrieval_heads == (tuple(range(6)), (2,), tuple(range(6)))
    assert (config.sink_tokens, config.window_tokens, config.dense_below) == (4, 8192, 16384)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"0": [1, 0]}, "0"),
        ({"0": [2, 0, 0, 0, 0, 0]}, "0"),
        ({"0": None}, "0"),
        ({"3": [1] * 6}, "3"),
        ({"swa_token_num": 0}, "swa_token_num"),
        ({"sink_token_num": 65}, "sink_token_num"),
        ({"mode": "fast"}, "mode"),
    ],
)
def test_a_wrong_headwise_config_is_refused(
    section: dict[str, Any], key: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, headwise_config=section)
    assert message.startswith("headwise_config.")
    assert key in message.split(" ")[0]


def test_our_section_counts_where_both_are_present(tmp_path: Path) -> None:
    config = read(tmp_path, rtpurbo=SECTION, headwise_config={"0": [0] * 6})
    assert config.sparse == sparse(tmp_path)
