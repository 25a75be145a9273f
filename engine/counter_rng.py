"""Random numbers without state: the draw for a token is a pure function of (seed, token index).

A generator that keeps state would tie a request's tokens to what else was in the batch and to
every recomputation. Here token `index` of a request always gets the same draw, so a replay after
a preemption or a restart samples the same tokens again.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014): a bijection of 64 bits in which every input bit
flips every output bit with probability close to one half.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: consecutive indices land far apart


def mix64(value: int) -> int:
    """Finaliser of SplitMix64 over `value` modulo 2^64; returns an integer in [0, 2^64)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, index: int) -> float:
    """The draw for generated token `index` (from 0) of a request with `seed` (any integer).

    The seed is mixed before the index is added: seeds 1 and 2 share no part of their sequences,
    as they would if index and seed were summed first. Returns a multiple of 2^-53 in [0, 1).
    """
    stream = mix64(seed + _GOLDEN)
    return (mix64(stream + (index + 1) * _GOLDEN) >> 11) * 2.0**-53
