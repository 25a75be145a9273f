"""Between host and device without waiting more than once a step.

What goes up is pinned and copied while the host goes on; what comes back is gathered into one
tensor and copied to pinned memory behind the step. Waiting for that copy is the only point at which
the host waits for the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_CODES = {torch.int64: "q", torch.float32: "f", torch.float64: "d"}


def upload(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Numbers of the host as a tensor [len(values)] on `device`; does not wait for it.

    Args:
        dtype: int64, float32 or float64.
    """
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    on_host = torch.frombuffer(array(_CODES[dtype], values), dtype=dtype)  # thrice as fast as lists
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


class Readback:
    """Tensors that the host wants, fetched together.

    They travel as float64, which holds integers up to 2^53, flags and any float32 exactly.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._sizes: list[int] = []
        self._on_host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def add(self, values: Tensor) -> int:
        """Remember a tensor of numbers or flags; returns its place in what `fetch` gives."""
        return self.add_joined(values.detach().flatten().double(), [values.numel()])[0]

    def add_joined(self, values: Tensor, sizes: Sequence[int]) -> list[int]:
        """Remember several that lie behind each other in one, float64; returns their places."""
        first = len(self._sizes)
        self._parts.append(values)
        self._sizes += sizes
        return list(range(first, len(self._sizes)))

    def send(self) -> None:
        """Queue the copy; what is queued later may write over the tensors. Add nothing any more."""
        whole = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        self._parts.clear()
        if whole.is_cuda:
            self._on_host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            self._on_host.copy_(whole, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            self._arrived.record(torch.cuda.current_stream(whole.device))
        else:
            self._on_host = whole.clone()

    def fetch(self) -> list[list[float]]:
        """All of them as flat lists, in the order in which they were added. Waits."""
        if not self._sizes:
            return []
        if self._on_host is None:
            self.send()
        assert self._on_host is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._on_host.tolist()
        lists, start = [], 0
        for size in self._sizes:
            lists.append(values[start : start + size])
            start += size
        return lists
