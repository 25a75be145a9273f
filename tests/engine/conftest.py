"""Fixtures that several files of the engine's tests share."""

from __future__ import annotations

import pytest

from tests.engine.core_bench import Bench


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def look_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are started before the one before is read: the loop promises the same."""
    monkeypatch.setattr(Bench, "look_ahead", request.param)
    return bool(request.param)
