"""The Triton prefill kernel compiles for an H100: tensor cores, no spills, memory that is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
SHARED_BYTES = 227 * 1024  # of a multiprocessor


def test_the_default_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_triton"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["dim"] for record in records} == {64, 128}
    for record in records:
        assert record["stack"] == 0, record
        assert record["wgmma"] > 0, record
        # Two programs share a multiprocessor.
        assert 2 * record["shared"] <= SHARED_BYTES, record
        assert 2 * record["used_registers"] * 32 * record["warps"] <= 65536, record
