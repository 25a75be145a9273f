"""Stores write exactly the given slots."""

from __future__ import annotations

import pytest
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


UGLY_KEYS = {
    "zeros": torch.zeros(4),
    "half-steps": torch.tensor([127.0, 0.5, 1.5, -2.5]),
    "scale-rounded-down": torch.tensor([127.3, -127.3, 1.0, 0.0]),
    "smallest": torch.tensor([1e-45, -1e-45, 0.0, 0.0]),
    "largest": torch.tensor([3e38, -3e38, 1e38, 0.0]),
    "nan": torch.tensor([1.0, torch.nan, 2.0, 3.0]),
    "inf": torch.tensor([1.0, torch.inf, 2.0, -torch.inf]),
}


@pytest.mark.parametrize("key", UGLY_KEYS.values(), ids=list(UGLY_KEYS))
def test_a_quantised_key_is_as_specified(key: torch.Tensor) -> None:
    steps, scales = paged_kv.quantise_index_keys(key.view(1, 1, 4))
    want_steps, want_scales = reference.quantise_index_keys(key.view(1, 1, 4))
    assert torch.equal(steps, want_steps)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    assert bool(scales.isfinite()) is bool(key.isfinite().all()), "a bad key has no good score"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_quantised_key_is_off_by_half_a_step(dtype: torch.dtype) -> None:
    """And by a quarter of one more at the ends, where the scale was rounded down."""
    keys_THI = (random_tensor(50, 3, 16) * random_tensor(50, 3, 1, seed=4).exp()).to(dtype)
    steps_THI, scales_TH = paged_kv.quantise_index_keys(keys_THI)
    assert steps_THI.dtype == torch.int8
    assert (steps_THI.abs().amax(-1) >= 126).all(), "all of the range is used"
    off_THI = (steps_THI * scales_TH.float()[..., None] - keys_THI.float()).abs()
    assert (off_THI <= 0.75 * scales_TH.float()[..., None]).all()
    want = reference.quantise_index_keys(keys_THI)
    assert torch.equal(steps_THI, want[0])
    assert torch.equal(scales_TH, want[1])


def test_store_int8_index_keys_writes_the_slots_and_nothing_else() -> None:
    keys_THI, slots_T = random_tensor(3, 4, 2), torch.tensor([5, 12, 4])
    caches = [torch.full((3, 4, 8, 2), 99, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((3, 4, 8), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    paged_kv.store_index_keys(keys_THI, caches[0], slots_T, scales[0])
    reference.store_index_keys(keys_THI, caches[1], slots_T, scales[1])
    assert torch.equal(*caches)
    torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
    assert scales[0].isfinite().sum() == 3 * 4


def test_gather_pages_reads_in_logical_order() -> None:
    cache = torch.arange(4 * 2 * 3 * 1.0).view(4, 2, 3, 1)
    got = paged_kv.gather_pages(cache, 1, torch.tensor([2, 0])).flatten()
    assert got.tolist() == [15.0, 16.0, 17.0, 3.0, 4.0, 5.0]
