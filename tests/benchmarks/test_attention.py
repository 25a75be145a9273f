"""`rtpurbo bench attention`: its counting, its tables, and what it says without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table

from benchmarks import attention_decode, prefill_figures
from benchmarks.attention import AttentionBench, BenchError, measure
from benchmarks.attention_prefill import attended_pairs
from benchmarks.attention_table import decode_table, plot, prefill_table, targets_table
from benchmarks.attention_targets import judge


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


def test_batches_of_decode_fit_one_gpu() -> None:
    shapes = AttentionBench(lengths=(2**15, 2**17, 2**20)).decode_shapes
    assert shapes == ((1, 2**15), (1, 2**17), (1, 2**20), (8, 2**15), (8, 2**17))
    assert AttentionBench(decode=False).decode_shapes == ()


def prefill_record(tokens: int, dense: dict[str, float], window: float = 540.2) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "dense_ms": dense,
        "window_ms": {"cuda": 6.0, "triton": 7.0},
        "window_teraflops": window,
        "window_peer": {},
        "retrieval_ms": {"cudnn": 4.0},
        "retrieval_teraflops": 600.0,
        "floor_ms": 8.0,
        **prefill_figures.ratios(dense, total=10.0, sparse_total=8.0),
    }


def decode_record(
    rows: int, context: int, dense: dict[str, float], whole: float = 20.0
) -> dict[str, Any]:
    int8 = {"microseconds": whole / 2, "select_microseconds": 5.0, "select_share_of_copy": 0.6}
    sparse = {
        "microseconds": whole,
        "attended_fraction": 0.031,
        "select_microseconds": 8.0,
        "select_share_of_copy": 0.76,
        "attention_microseconds": 9.0,
        "attention_share_of_copy": 0.74,
        "local_microseconds": 7.0,
        "retrieval_microseconds": 6.0,
        "floor_microseconds": 4.0,
        "int8": int8,
    }
    found = attention_decode.ratios(dense, sparse)
    shape = {"rows": rows, "context": context, "share": 0.03}
    return {**shape, "dense": dense, "sparse": sparse, **found}


def cells_of(table: Table) -> list[list[str]]:
    return [list(map(str, column.cells)) for column in table.columns]


def test_a_backend_that_refused_leaves_a_gap(tmp_path: Path) -> None:
    all_three = {"flash": 30.0, "cudnn": 20.0, "flashinfer": 15.0}
    records = [prefill_record(32768, all_three), prefill_record(65536, {"flash": 90.0})]
    cells = cells_of(prefill_table(records))
    assert cells[0] == ["32K", "64K"]
    assert cells[2:4] == [["20.0", "-"], ["15.0", "-"]]
    fastest = ["1.50x flashinfer", "9.00x flash"]
    assert cells[-3:] == [["3.00x", "9.00x"], fastest, ["3.75x", "11.25x"]]
    decode = [decode_record(1, 32768, {"cudnn": 40.0}), decode_record(8, 2**20, {})]
    cells = cells_of(decode_table(decode))
    assert cells[0] == ["1 x 32K", "8 x 1M"]
    assert cells[2:5] == [["-", "-"], ["40.0", "-"], ["-", "-"]]
    assert cells[6] == ["2.00x", "-"]
    plot({"prefill": records, "decode": decode[:1]}, tmp_path / "a.png")
    plot({"prefill": [], "decode": decode[:1]}, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 0


def test_targets_are_held_against_the_fastest_of_the_run() -> None:
    prefill = [
        prefill_record(2**17, {"flash": 71.0, "cudnn": 36.0, "flashinfer": 34.0}, window=530.0),
        prefill_record(2**20, {"flash": 110.0}, window=510.0),
    ]
    dense = {"flash": 99.0, "cudnn": 90.0, "flashinfer": 86.5}
    decode = [decode_record(1, 2**17, dense), decode_record(8, 2**17, dense, whole=15.7)]
    found = judge({"prefill": prefill, "decode": decode})
    by_name = {(t["where"], t["what"]): (t["figure"], t["hit"]) for t in found}
    assert by_name["prefill 32K", "over flash"] == (None, None)
    assert by_name["prefill 128K", "over flash"] == (7.1, True)
    assert by_name["prefill 128K", "over the fastest"] == (3.4, False)
    assert by_name["prefill 128K", "sparse, over flash"] == (71 / 8, False)
    assert by_name["prefill 1M", "over flash"] == (11.0, False)
    assert by_name["prefill 64K and longer", "window"] == (510.0, False)
    assert by_name["decode 1 x 128K", "over the fastest"] == (86.5 / 20, True)
    assert by_name["decode 8 x 128K", "over the fastest"] == (86.5 / 15.7, True)
    assert by_name["decode 8 x 128K", "int8 index"] == (2 * 86.5 / 15.7, True)
    assert by_name["decode 1 x 1M", "selection"] == (None, None)
    assert by_name["decode 8 x 128K", "attention"] == (0.74, False)
    assert len(by_name) == len(found) == 18
    verdicts = cells_of(targets_table(found))[-1]
    assert verdicts.count("not measured") == sum(t["hit"] is None for t in found)
    assert verdicts.count("hit") == sum(t["hit"] is True for t in found)
