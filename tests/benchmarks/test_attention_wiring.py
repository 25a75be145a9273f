"""The attention benchmarks from end to end at small shapes: kernels in emulation, nothing timed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    attention_decode,
    attention_sparse_prefill,
    decode_anatomy,
    decode_layers,
    dense_decode,
    dense_prefill,
    prefill_figures,
)
from benchmarks.attention_layer import BLOCK, DIM, KV_HEADS, RETRIEVAL
from benchmarks.decode_grids import grids
from benchmarks.flashinfer_peer import FlashInfer
from benchmarks.kernel_cuts import SELECTIONS, VARIANTS, Libraries
from kernels import prefill_triton
from kernels._args import DecodePlan
from kernels._launch import KernelLibrary
from kernels.decode_grid import DecodeGrid
from tests.benchmarks import fake_flashinfer
from tests.benchmarks.without_gpu import TIME, without_gpu
from tests.kernels.emulation.library import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate with")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> FlashInfer:
    for name, module in fake_flashinfer.modules(lambda module: None).items():
        monkeypatch.setitem(sys.modules, name, module)
    return FlashInfer.make(torch.device("cpu"))


def test_a_decode_row_has_all_peers_and_parts(
    monkeypatch: pytest.MonkeyPatch, emulated_kernels: KernelLibrary, peer: FlashInfer
) -> None:
    rows, context = 2, 5 * BLOCK
    monkeypatch.setattr(decode_layers, "MOST_LAYERS", 2)
    monkeypatch.setattr(decode_layers, "BYTES_PER_GRAPH", 2**22)
    monkeypatch.setattr(dense_decode, "BYTES_PER_GRAPH", 2**22)
    monkeypatch.setattr(attention_decode, "SHARES", (0.03,))
    bandwidth = 1e12
    with without_gpu(monkeypatch, decode_layers, dense_decode):
        (record,) = attention_decode.records(emulated_kernels, [(rows, context)], bandwidth, peer)
    assert record["dense"]["flashinfer"] == TIME
    assert record["dense"]["flash"] == TIME
    assert record["ratio"] == record["int8_ratio"] == 1.0
    sparse = record["sparse"]
    # The window is longer than the context: every block is needed once by every KV head.
    kv_bytes = rows * context * KV_HEADS * DIM * 4
    index_bytes = rows * context * len(RETRIEVAL) * 32
    assert sparse["attention_share_of_copy"] == pytest.approx(kv_bytes / 1e-5 / bandwidth)
    assert sparse["select_share_of_copy"] == pytest.approx(index_bytes / 1e-5 / bandwidth)
    assert sparse["floor_microseconds"] == pytest.approx(1e6 * (kv_bytes + index_bytes) / bandwidth)
    int8_bytes = index_bytes * 18 / 32
    assert sparse["int8"]["select_share_of_copy"] == pytest.approx(int8_bytes / 1e-5 / bandwidth)
    assert 0 < sparse["attended_fraction"] <= 1


def test_the_anatomy_has_every_variant_and_setting(
    monkeypatch: pytest.MonkeyPatch, emulated_kernels: KernelLibrary
) -> None:
    """All variants are the whole kernel here: what is cut is compiled by nvcc alone."""
    rows, context = 1, 2 * BLOCK
    path = Path(emulated_kernels.host._name)
    monkeypatch.setattr(decode_layers, "MOST_LAYERS", 1)
    few = partial(some_grids, names=["as planned", "each CTA for itself", "clusters of 2"])
    monkeypatch.setattr(decode_anatomy, "grids", few)
    with without_gpu(monkeypatch, decode_layers, decode_anatomy):
        same = (dict.fromkeys(variants, path) for variants in (VARIANTS, SELECTIONS))
        record: dict[str, Any] = {}
        kept: list[str] = []

        def keep(figures: dict[str, Any]) -> None:
            record.update(figures)
            kept.append(", ".join(figures))

        decode_anatomy.anatomy(Libraries(*same), rows, context, keep)
    assert kept[1:] == ["selection", "settings", "grids", "grids", "grids"], "each as it is there"
    assert record["kv_bytes"] == rows * context * KV_HEADS * DIM * 4
    every = {"all": TIME, "local": TIME, "retrieval": TIME}
    assert record["parts"] == dict.fromkeys(VARIANTS, every)
    keys = ("select", "whole", "select, int8", "whole, int8")
    selections = [*SELECTIONS, "whole, by shares"]
    assert record["selection"] == {name: dict.fromkeys(keys, TIME) for name in selections}
    both = {"whole": TIME, "select": TIME, "attention": TIME}
    assert record["settings"]["as planned"] == both
    assert len(record["settings"]) > len(VARIANTS)
    assert [table.row_count for table in decode_anatomy.tables(record)] == [
        len(VARIANTS),
        len(selections),
        len(record["settings"]),
        3,
    ]


def some_grids(
    plan: DecodePlan, rows: int, tiles: int, blocks: int, names: Sequence[str]
) -> dict[str, DecodeGrid]:
    found = grids(plan, rows, tiles, blocks)
    return {name: found[name] for name in names}


def test_every_grid_is_one_that_can_be_launched() -> None:
    plan = DecodePlan(ctas=396, clusters_of_8=49, clusters_of_16=24)
    for rows in (1, 8):
        found = grids(plan, rows, 8, 512)
        assert found["as planned"] == DecodeGrid.of(plan, rows, 8, BLOCK, 512)
        assert len(set(found.values())) >= len(found) - 3, "few names for the same"
        for grid in found.values():
            assert 0 < grid.ctas <= plan.ctas
            assert grid.ctas % max(1, grid.cluster) == 0
            assert grid.held_back < grid.ctas // max(1, grid.cluster)
            assert min(grid.least_blocks, grid.least_listed) > 0
    assert list(grids(plan, 64, 8, 512)) == ["as planned", "each CTA for itself"]


def test_a_prefill_row_has_all_peers_and_parts(
    monkeypatch: pytest.MonkeyPatch, emulated_kernels: KernelLibrary, peer: FlashInfer
) -> None:
    def refuses(*args: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(prefill_triton, "attend_spans", refuses)
    parts = (dense_prefill, prefill_figures, attention_sparse_prefill)
    with without_gpu(monkeypatch, *parts):
        record = prefill_figures.prefill_record(emulated_kernels, 2 * BLOCK, 1e12, peer)
    assert record["dense_ms"]["flashinfer"] == TIME
    assert record["window_peer"]["milliseconds"] == TIME
    assert record["window_ms"] == {"cuda": TIME}
    assert record["retrieval_ms"]["cuda"] == TIME
    assert record["retrieval_ms"]["flashinfer"] == TIME
    assert record["times_faster"]["flashinfer"] == 0.5
    assert set(record["sparse_ms"]) == {"score", "select", "attend"}
