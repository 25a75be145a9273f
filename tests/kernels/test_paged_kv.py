"""Stores write exactly the given slots."""

from __future__ import annotations

import torch

from kernels import paged_kv, reference
from tests.kernels.paged_case import random_tensor


def test_store_kv_writes_the_slots_and_nothing_else() -> None:
    k_TND, v_TND = random_tensor(5, 2, 4), random_tensor(5, 2, 4, seed=2)
    slots_T = torch.tensor([9, 31, 8, 16, 23])
    caches = [torch.full((4, 2, 8, 4), torch.nan) for _ in range(4)]
    paged_kv.store_kv(k_TND, v_TND, caches[0], caches[1], slots_T)
    reference.store_kv(k_TND, v_TND, caches[2], caches[3], slots_T)
    for got, expected in zip(caches[:2], caches[2:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert got.isfinite().sum() == 5 * 2 * 4


def test_store_index_keys() -> None:
    keys_THI, slots_T = random_tensor(3, 4, 2), torch.tensor([5, 12, 4])
    got, expected = (torch.zeros(3, 4, 8, 2) for _ in range(2))
    paged_kv.store_index_keys(keys_THI, got, slots_T)
    reference.store_index_keys(keys_THI, expected, slots_T)
    assert torch.equal(got, expected)


def test_gather_pages_reads_in_logical_order() -> None:
    cache = torch.arange(4 * 2 * 3 * 1.0).view(4, 2, 3, 1)
    got = paged_kv.gather_pages(cache, 1, torch.tensor([2, 0])).flatten()
    assert got.tolist() == [15.0, 16.0, 17.0, 3.0, 4.0, 5.0]
