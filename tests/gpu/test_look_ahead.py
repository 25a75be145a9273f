"""On a GPU host: steps that are started before the one before is read. Skips itself without CUDA.

python -m pytest tests/gpu/test_look_ahead.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.step import EngineParts
from engine.worker import ModelRunner
from tests.engine.decode_case import MODEL as TINY
from tests.engine.decode_case import POISONED, generate, greedy, same
from tests.engine.look_ahead_case import compare
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.gpu.test_engine_cuda import load, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TIGHT: dict[str, Any] = {"dtype": "float32", "max_model_len": 160, "kv_cache_bytes": 2**26}


def recorded(parts: EngineParts) -> EngineParts:
    assert parts.runner.overlaps
    return parts


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_steps_ahead_change_no_answer(tmp_path: Path, cuda_graphs: bool) -> None:
    """Ragged ends, stop ids, clients that leave, seeds: on a model whose logits are far apart."""
    folder = write_checkpoint(tmp_path / "model", TINY)
    inputs = [[7 + i * k % 50 for i in range(n)] for k, n in ((3, 40), (7, 3), (11, 90))]
    inputs += [prompt[::-1] for prompt in inputs]
    assert load(folder, cuda_graphs=cuda_graphs, **TIGHT).runner.overlaps == cuda_graphs
    compare(lambda: load(folder, cuda_graphs=cuda_graphs, **TIGHT), inputs, most=60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_the_same_where_nobody_ends_by_surprise(dtype: str) -> None:
    """Then no step has a row for nothing, and all numbers are equal to the last bit."""
    wanted = [(prompt, greedy(20 + 9 * i)) for i, prompt in enumerate(prompts())]
    want = generate(load(dtype=dtype), wanted, look_ahead=False)
    for _ in range(3):  # what two steps under way do to each other depends on the moment
        same(generate(recorded(load(dtype=dtype)), wanted, look_ahead=True), want)


def test_long_answers_with_a_step_always_under_way() -> None:
    """Hundreds of steps in which a page is filled, a window slides and graphs change their size."""
    wanted = [(prompt, greedy(300 + 40 * i)) for i, prompt in enumerate(prompts((600, 64, 1, 250)))]
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024}
    want = generate(load(**settings), wanted, look_ahead=False)
    same(generate(recorded(load(**settings)), wanted, look_ahead=True), want)


def test_F07_what_a_step_ahead_stores_for_a_failed_row_is_wiped(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY)
    inputs = [[7 + i * k % 50 for i in range(n)] for k, n in ((3, 40), (7, 3), (13, 17))]
    expected = generate(load(folder, **TIGHT), [(prompt, greedy(30)) for prompt in inputs])
    parts = recorded(load(folder, **TIGHT))
    assert isinstance(parts.runner, ModelRunner)
    with torch.no_grad():
        parts.runner._decoder.embedding.weight[POISONED] = torch.nan
    params = [greedy(30), greedy(12, logit_bias={POISONED: 1000.0}), greedy(30)]
    got = generate(parts, list(zip(inputs, params, strict=True)), look_ahead=True)
    assert got[1][:2] == ([POISONED], "error")
    assert [got[0], got[2]] == [expected[0], expected[2]]
    for layer in parts.runner._cache.layers:
        for pool in layer.full_tensors + layer.window_tensors:
            assert pool.isfinite().all(), "pages go back clean"
