"""On a GPU host: faults F05, F06 and F07 for real. Skips itself without CUDA.

python -m pytest tests/gpu/test_faults_cuda.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import StepMemoryError
from engine.worker import ModelRunner
from tests.engine.broken_device import generate_through_a_fault
from tests.engine.decode_case import MODEL as TINY
from tests.engine.decode_case import POISONED, generate, greedy
from tests.engine.process_bench import run
from tests.engine.tiny_checkpoint import write_checkpoint
from tests.gpu.test_engine_cuda import load, prompts, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

_SMALLEST = 2**21  # bytes of a piece of ballast: the allocator's own smallest segment


def fill_memory(leave: int) -> list[Tensor]:
    """Tensors that take all free memory but `leave` bytes: the device's, and what the allocator
    holds unused between live tensors, which `mem_get_info` calls taken."""
    torch.cuda.empty_cache()
    room = torch.empty(leave, dtype=torch.uint8, device="cuda")
    ballast: list[Tensor] = []
    size = torch.cuda.mem_get_info()[0]
    while size >= _SMALLEST:
        try:
            ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    del room
    torch.cuda.empty_cache()
    return ballast


def test_F05_a_real_out_of_memory_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step needs is measured, then a third of it is left: the same tokens come out.

    It is measured on an engine that has answered before: with what libraries take at first use,
    and keep, a third was enough.
    """
    wanted = [(prompt, greedy(16)) for prompt in prompts((12_000, 9000, 300))]
    parts = load(dtype="float32", max_batch_tokens=8192, prefix_caching=False)
    expected = generate(parts, wanted)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert tokens_of(generate(parts, wanted)) == tokens_of(expected)
    needed = torch.cuda.max_memory_allocated() - before
    failures, attempt = [], ModelRunner._attempt

    def counting(self: ModelRunner, *args: Any) -> Any:
        try:
            return attempt(self, *args)
        except StepMemoryError as error:
            failures.append(str(error))
            raise

    monkeypatch.setattr(ModelRunner, "_attempt", counting)
    ballast = fill_memory(leave=needed // 3)
    try:
        got = generate(parts, wanted)
    finally:
        ballast.clear()
        torch.cuda.empty_cache()
    assert failures, f"a step of {needed:,} bytes found them although a third was left"
    assert tokens_of(got) == tokens_of(expected)
    assert [reason for _, reason, _ in got] == ["length"] * 3
    assert tokens_of(generate(parts, wanted)) == tokens_of(expected)


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_F07_a_nan_in_a_prompt_fails_alone_and_leaves_the_shared_prefix(
    tmp_path: Path, cuda_graphs: bool
) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY)
    settings = {"dtype": "float32", "max_model_len": 160, "kv_cache_bytes": 2**26}
    settings |= {"cuda_graphs": cuda_graphs, "max_batch_tokens": 32}
    prefix = [7 + i * 3 % 50 for i in range(64)]
    good = [([*prefix, 11, 12], greedy(12)), ([*prefix, 18], greedy(12))]
    bad = ([*prefix, *[14] * 5, POISONED, *[15] * 30], greedy(12))
    expected = generate(load(folder, **settings), good)
    assert all(POISONED not in tokens for tokens in tokens_of(expected)), "they would fail too"
    parts = load(folder, **settings)
    assert isinstance(parts.runner, ModelRunner)
    with torch.no_grad():
        parts.runner._decoder.embedding.weight[POISONED] = torch.nan
    first = generate(parts, [good[0]])
    hits = parts.scheduler.queues.prefix_hit_tokens
    answers = generate(parts, [good[1], bad, good[0]])
    assert answers[1][:2] == ([], "error")
    assert tokens_of([*first, answers[0]]) == tokens_of(expected)
    assert answers[2][0] == expected[0][0]
    assert parts.scheduler.queues.prefix_hit_tokens >= hits + 3 * 48
    for layer in parts.runner._cache.layers:
        for pool in layer.full_tensors + layer.window_tensors:
            assert pool.isfinite().all()


def test_F06_streams_outlast_a_device_side_assertion(tmp_path: Path) -> None:
    """The context is lost with the process; the next one goes on with the same tokens."""
    folder = write_checkpoint(tmp_path / "model", TINY)
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 2**26, "max_model_len": 160}
    jobs = [(list(range(40)), greedy(100)), ([5, 3], greedy(120))]
    expected = generate(load(folder, **settings), jobs)
    marker = tmp_path / "marker"
    marker.touch()

    async def test() -> None:
        config = EngineConfig(model=str(folder), device="cuda", max_num_seqs=6, **settings)
        generations, engine = await generate_through_a_fault(config, jobs, marker)
        assert [generation.output for generation in generations] == tokens_of(expected)
        assert (engine.restarts, engine.recovery.resumed) == (1, 2)

    run(test)
