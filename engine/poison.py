"""Requests that are known to end the engine, remembered for a while to refuse their retries."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from engine.request import SamplingParams

_REMEMBERED = 1024  # fingerprints of 32 bytes


class PoisonList:
    """Fingerprints of guilty requests, the oldest forgotten first and all after some time."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """`seconds` is how long one is remembered, by `clock`."""
        self._seconds = seconds
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, prompt: bytes, params: SamplingParams) -> None:
        """Remember a request; `prompt` is its int32 buffer."""
        fingerprint = _fingerprint(prompt, params)
        self._until.pop(fingerprint, None)
        self._until[fingerprint] = self._clock() + self._seconds
        if len(self._until) > _REMEMBERED:
            self._until.popitem(last=False)

    def holds(self, prompt: bytes, params: SamplingParams) -> bool:
        """Whether the same request ended the engine not long ago. Free while the list is empty."""
        now = self._clock()
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        return bool(self._until) and _fingerprint(prompt, params) in self._until


def _fingerprint(prompt: bytes, params: SamplingParams) -> bytes:
    """SHA-256 of all that a request asks for, but for the seed: a retry draws a new one."""
    bias = dict(sorted(params.logit_bias.items()))
    asked = msgspec.msgpack.encode(msgspec.structs.replace(params, seed=0, logit_bias=bias))
    return hashlib.sha256(len(prompt).to_bytes(8) + prompt + asked).digest()
