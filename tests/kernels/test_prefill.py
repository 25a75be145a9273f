"""Prefill ops against the specification: chunks at any offset, window edges, ragged batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import prefill, reference, softmax_attention
from kernels.softmax_attention import attend_with_lse
from tests.kernels.paged_case import PagedCase, random_tensor

# (context length, query tokens) of each span
SPANS = {
    "one-token": [(1, 1)],
    "whole": [(50, 50)],
    "chunk": [(70, 13)],
    "last-token": [(65, 1)],
    "ragged": [(8, 8), (9, 1), (100, 37), (33, 33)],
}
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
WINDOWS = [(1, 0), (8, 4), (7, 8), (24, 2), (33, 4), (1000, 4)]


def arguments(spans: list[tuple[int, int]], kv_rows: list[int]) -> Arguments:
    case = PagedCase.make([context for context, _ in spans], seed=len(spans))
    counts = torch.tensor([0] + [queries for _, queries in spans])
    q_THD = random_tensor(int(counts.sum()), len(kv_rows), 16)
    starts = counts.cumsum(0)
    rows = torch.tensor(kv_rows)
    return q_THD, rows, case.k_cache, case.v_cache, case.tables_SB, starts, case.lens_S


@pytest.mark.parametrize("kv_rows", [[0, 1], [1, 1, 0, 1], [0]], ids=str)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_dense(spans: list[tuple[int, int]], kv_rows: list[int]) -> None:
    args = arguments(spans, kv_rows)
    torch.testing.assert_close(
        prefill.prefill_dense(*args, 0.25), reference.prefill_dense(*args, 0.25)
    )


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_windowed(spans: list[tuple[int, int]], window: int, sinks: int) -> None:
    args = arguments(spans, [1, 0, 1])
    tables = args[4]
    for row, (context, queries) in enumerate(spans):
        tables[row, 1 : max(1, (context - queries - window + 1) // 8)] = 0
    expected = reference.prefill_windowed(*args, window, sinks, 0.25)
    torch.testing.assert_close(prefill.prefill_windowed(*args, window, sinks, 0.25), expected)


def test_windowed_over_many_tiles() -> None:
    args = arguments([(400, 390)], [0, 0, 1])
    expected = reference.prefill_windowed(*args, 100, 4, 0.25)
    torch.testing.assert_close(prefill.prefill_windowed(*args, 100, 4, 0.25), expected)


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    q_THD, rows, k_cache, v_cache, tables, _, _ = arguments([(100, 100)], [0, 1])
    cache = (rows, k_cache, v_cache, tables)
    whole = prefill.prefill_windowed(
        q_THD, *cache, torch.tensor([0, 100]), torch.tensor([100]), 20, 4, 0.25
    )
    for start, stop in [(0, 37), (37, 38), (38, 100)]:
        part = prefill.prefill_windowed(
            q_THD[start:stop],
            *cache,
            torch.tensor([0, stop - start]),
            torch.tensor([stop]),
            20,
            4,
            0.25,
        )
        torch.testing.assert_close(part, whole[start:stop])


@pytest.mark.parametrize("case", ["plain", "causal", "bias"])
def test_portable_path_equals_the_cpu_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_attention, "MAX_SCORES", 100)  # several slices
    q, k, v = random_tensor(2, 3, 12, 8), random_tensor(2, 12, 8), random_tensor(2, 12, 8, seed=3)
    bias = torch.zeros(12, 12).masked_fill(torch.rand(12, 12) < 0.3, -torch.inf)
    bias.fill_diagonal_(0)
    causal, bias_TS = case == "causal", bias if case == "bias" else None
    fast = attend_with_lse(q, k, v, 0.3, causal=causal, bias_TS=bias_TS)
    portable = softmax_attention._portable(q, k, v, 0.3, causal, bias_TS)
    torch.testing.assert_close(portable, fast)
