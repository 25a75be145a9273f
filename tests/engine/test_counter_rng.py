"""Random numbers by counter: the published generator, and its streams."""

from __future__ import annotations

import torch

from engine.counter_rng import mix64, uniform


def test_mix64_is_the_published_splitmix64() -> None:
    """The first outputs of SplitMix64 with seed 1234567, from the authors' reference code."""
    golden = 0x9E3779B97F4A7C15
    outputs = [mix64(1234567 + golden * i) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_are_uniform_and_streams_do_not_resemble_each_other() -> None:
    for seed in (0, 1, -1, 2**63 - 1):
        draws = torch.tensor([uniform(seed, i) for i in range(4000)], dtype=torch.float64)
        counts = torch.histc(draws, 20, 0, 1)
        chi_square = ((counts - 200) ** 2 / 200).sum().item()
        assert chi_square < 43.8  # 99.9 % quantile for 19 degrees of freedom
        following = torch.tensor([uniform(seed + 1, i) for i in range(4000)], dtype=torch.float64)
        assert abs(torch.corrcoef(torch.stack([draws, following]))[0, 1].item()) < 0.06
        shifted = torch.corrcoef(torch.stack([draws[1:], following[:-1]]))[0, 1].item()
        assert abs(shifted) < 0.06
