"""`rtpurbo bench attention`: its counting, its tables, and what it says without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import AttentionBench, BenchError, measure
from benchmarks.attention_prefill import attended_pairs
from benchmarks.attention_table import plot, prefill_table


@pytest.mark.parametrize("window", [1, 3, 8, 30, None], ids=str)
@pytest.mark.parametrize("sinks", [0, 2, 9])
@pytest.mark.parametrize("tokens", [1, 8, 20])
def test_work_is_the_pairs_that_the_rule_lets_see(
    tokens: int, sinks: int, window: int | None
) -> None:
    m, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = torch.ones(tokens, tokens, dtype=torch.bool) if window is None else m - j < window
    seen = (j <= m) & (near | (j < sinks))
    assert attended_pairs(tokens, window, sinks) == int(seen.sum())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BenchError, match="needs a CUDA GPU"):
        measure(AttentionBench())


def record(tokens: int, dense: dict[str, float]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "dense_ms": dense,
        "times_faster": {name: ms / 10 for name, ms in dense.items()},
        "sparse_times_faster": {"flash": 4.0},
        "window_ms": {"cuda": 6.0, "triton": 7.0},
        "window_teraflops": 540.2,
        "retrieval_ms": {"cudnn": 4.0},
        "retrieval_teraflops": 600.0,
        "total_ms": 10.0,
        "floor_ms": 8.0,
    }


def test_a_backend_that_refused_leaves_a_gap(tmp_path: Path) -> None:
    records = [record(32768, {"flash": 30.0, "cudnn": 20.0}), record(65536, {"flash": 90.0})]
    table = prefill_table(records)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["32K", "64K"]
    assert cells[2] == ["20.0", "-"]
    assert cells[-3:] == [["3.00x", "9.00x"], ["2.00x", "-"], ["4.00x", "4.00x"]]
    decode = [{"rows": 1, "context": 32768, "share": 0.03, "ratio": 2.5}]
    plot({"prefill": records, "decode": decode}, tmp_path / "a.png")
    plot({"prefill": [], "decode": decode}, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 0
