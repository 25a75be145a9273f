"""The decode benchmark measures what it says, on a model that decodes in no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine_decode import measure
from engine.config import EngineConfig
from engine.loading import load_engine_parts
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint


def test_every_step_gives_each_stream_a_token(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TinyModel())
    config = EngineConfig(model=str(folder), device="cpu", threads=1, max_num_seqs=3)
    parts = load_engine_parts(config)
    figures = measure(parts, [[7] * 20, [8] * 31, [9] * 4], steps=5)
    assert figures["decodes_with"] == "PyTorch ops"
    assert figures["runner_ms"] <= figures["step_ms"]
    per_second = 3e3 / figures["step_ms"]
    assert figures["tokens_per_second"] == pytest.approx(per_second, rel=1e-2)
    assert "kernels_ms" not in figures, "nothing to add up without a GPU"
