"""How many seeds the simulation runs."""

from __future__ import annotations

import pytest


@pytest.fixture
def simulation_seeds(request: pytest.FixtureRequest) -> range:
    """Seeds from --simulation-first on, --simulation-seeds of them (`tests/conftest.py`)."""
    first: int = request.config.getoption("--simulation-first")
    count: int = request.config.getoption("--simulation-seeds")
    return range(first, first + count)
