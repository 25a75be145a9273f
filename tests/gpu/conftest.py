"""What several modules run on."""

from __future__ import annotations

import pytest

from kernels._build import default_cache, find_library
from kernels._launch import KernelLibrary


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(find_library(default_cache()))
