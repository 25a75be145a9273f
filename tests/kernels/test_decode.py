"""Decode ops against the specification: ragged rows, any GQA ratio, poisoned unused memory."""

from __future__ import annotations

import pytest
import torch

from kernels import decode, indexer, reference
from tests.kernels.paged_case import PagedCase, random_tensor

LENGTHS = {
    "one-token": [1],
    "off-a-block-edge": [7, 8, 9, 17],
    "ragged": [1, 64, 33, 100, 8],
}
KV_ROWS = {"mha": [0, 1], "gqa": [0, 0, 0, 1, 1, 1], "uneven": [1, 0, 1, 1], "one-head": [1]}


@pytest.mark.parametrize("rows", KV_ROWS.values(), ids=KV_ROWS)
@pytest.mark.parametrize("lens", LENGTHS.values(), ids=LENGTHS)
def test_dense(lens: list[int], rows: list[int]) -> None:
    case = PagedCase.make(lens)
    q_RHD = random_tensor(len(lens), len(rows), 16)
    args = (
        q_RHD,
        torch.tensor(rows),
        case.k_cache,
        case.v_cache,
        case.tables_SB,
        case.lens_S,
        0.25,
    )
    torch.testing.assert_close(decode.decode_dense(*args), reference.decode_dense(*args))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (8, 4), (9, 8), (24, 1), (63, 4), (500, 4)])
@pytest.mark.parametrize("lens", LENGTHS.values(), ids=LENGTHS)
def test_windowed(lens: list[int], window: int, sinks: int) -> None:
    case = PagedCase.make(lens)
    # Pages that no query can see are given back: their table entries are 0.
    for row, length in enumerate(lens):
        case.tables_SB[row, 1 : max(1, (length - window) // 8)] = 0
    q_RHD = random_tensor(len(lens), 4, 16)
    kv_row_H = torch.tensor([0, 1, 1, 0])
    args = (q_RHD, kv_row_H, case.k_cache, case.v_cache, case.tables_SB, case.lens_S)
    got = decode.decode_windowed(*args, window, sinks, 0.25)
    torch.testing.assert_close(got, reference.decode_windowed(*args, window, sinks, 0.25))


@pytest.mark.parametrize("limit", [1, 2**24], ids=["row-by-row", "at-once"])
@pytest.mark.parametrize("lens", LENGTHS.values(), ids=LENGTHS)
def test_sparse(lens: list[int], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_GATHERED", limit)
    case = PagedCase.make(lens)
    q_RHD = random_tensor(len(lens), 5, 16)
    log_mass = 3 * random_tensor(len(lens), 5, case.tables_SB.shape[1], seed=2)
    past_RB = torch.arange(case.tables_SB.shape[1]) * 8 >= case.lens_S[:, None]
    log_mass = log_mass.masked_fill(past_RB[:, None], -torch.inf)
    mask = indexer.select_blocks(log_mass, torch.full((len(lens), 5), 0.6), case.lens_S, 8)
    args = (q_RHD, torch.tensor([1, 0, 0, 1, 1]), case.k_cache, case.v_cache, case.tables_SB)
    got = decode.decode_sparse(*args, case.lens_S, mask, 0.25)
    torch.testing.assert_close(got, reference.decode_sparse(*args, case.lens_S, mask, 0.25))


def test_replayed_rows_share_a_table() -> None:
    """Several generated tokens of one sequence are rows with growing context lengths."""
    case = PagedCase.make([40])
    contexts = torch.arange(30, 41)
    tables = case.tables_SB.expand(len(contexts), -1)
    q_RHD = random_tensor(len(contexts), 2, 16)
    args = (q_RHD, torch.tensor([0, 1]), case.k_cache, case.v_cache, tables, contexts, 0.25)
    torch.testing.assert_close(decode.decode_dense(*args), reference.decode_dense(*args))


def test_the_door_names_what_is_wrong() -> None:
    case = PagedCase.make([9])
    args = (torch.tensor([0, 1]), case.k_cache, case.v_cache, case.tables_SB, case.lens_S, 1.0)
    with pytest.raises(ValueError, match=r"k_cache must be \[P N K D\] with D=15, got 16"):
        decode.decode_dense(random_tensor(1, 2, 15), *args)
