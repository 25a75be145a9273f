"""How many kernels something would start on a GPU, counted on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels._launch import KernelLibrary

LAUNCHERS = ("launch", "launch_select", "launch_decode")
NO_KERNEL = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", "lift_fresh")


class LaunchCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts torch's ops but views and allocations, and launches of the project's own kernels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.names: Counter[str] = Counter()
        for launcher in LAUNCHERS:
            patch.setattr(KernelLibrary, launcher, self._counted(getattr(KernelLibrary, launcher)))

    def _counted(self, launch: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any) -> None:
            name = next((arg for arg in args if isinstance(arg, str)), launch.__name__)
            self.names[name] += 1
            launch(*args)

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        name = func.overloadpacket.__name__
        result: torch.Tensor = func(*args, **(kwargs or {}))
        copies = name == "to" and result is not args[0]  # else it gives its argument back
        if copies or not (func.is_view or name in NO_KERNEL):
            self.names[name] += 1
        return result
