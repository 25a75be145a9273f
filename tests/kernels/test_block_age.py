"""Ranges of ages against Python's own bit_length, and biases at the right blocks."""

from __future__ import annotations

import torch

from kernels.block_age import AGE_RANGES, age_bias, age_ranges


def test_the_range_is_the_number_of_bits_of_the_age() -> None:
    ages = [0, 1, 2, 3, 4, 7, 8, 1023, 1024, 16383, 16384, 65534]
    want = [min(age.bit_length(), AGE_RANGES - 1) for age in ages]
    assert age_ranges(torch.tensor(ages)).tolist() == want


def test_what_is_to_come_is_as_new_as_the_query() -> None:
    assert age_ranges(torch.tensor([-1, -70000])).tolist() == [0, 0]


def test_every_row_counts_from_its_own_newest_block() -> None:
    bias_HA = torch.arange(2 * AGE_RANGES, dtype=torch.float32).view(2, AGE_RANGES)
    lengths_R = torch.tensor([1, 64, 65, 64 * 5])
    bias_RHB = age_bias(bias_HA, lengths_R, width=5, block_tokens=64)
    assert bias_RHB.shape == (4, 2, 5)
    assert bias_RHB[:, 0].tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [3, 2, 2, 1, 0],
    ]
    assert torch.equal(bias_RHB[:, 1], bias_RHB[:, 0] + AGE_RANGES)
