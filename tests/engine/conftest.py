"""Fixtures that several files of the engine's tests share."""

from __future__ import annotations

import pytest
import torch

from engine import kernel_choice
from tests.engine.core_bench import Bench


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def look_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are started before the one before is read: the loop promises the same."""
    monkeypatch.setattr(Bench, "look_ahead", request.param)
    return bool(request.param)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice can see."""

    class Anything:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Anything)
    monkeypatch.setattr(kernel_choice, "try_decode_kernels", lambda *_: None)
