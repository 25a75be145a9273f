"""Runs what the attention benchmarks run, on the CPU and once, with kernels in emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

TIME = 10.0  # of everything


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kept = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*map(_here, args), **kept)


def _here(value: Any) -> Any:
    is_gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return "cpu" if is_gpu else value


def call_once(call: Callable[[], object]) -> float:
    call()
    return TIME


def call_each(calls: Sequence[Callable[[], object]]) -> float:
    for call in calls:
        call()
    return TIME


def time_each(call: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
    call()
    return [TIME] * repeats


@contextmanager
def without_gpu(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> Iterator[None]:
    """`modules` time nothing inside, whatever of `device_times` they use."""
    stand_ins = {
        "time_of": call_once,
        "graph_microseconds": call_each,
        "milliseconds": time_each,
    }
    generator = torch.Generator
    with monkeypatch.context() as patch, OnTheCpu():
        patch.setattr(torch, "Generator", lambda device: generator("cpu"))
        for module in modules:
            for name, function in stand_ins.items():
                if hasattr(module, name):
                    patch.setattr(module, name, function)
        yield
