"""The decode benchmark measures what it says, on a model that decodes in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_decode import (
    PROFILED_STEPS,
    WARM_STEPS,
    engine_config,
    measure,
    parse,
    stream_tokens,
)
from engine.kv_pools import KvPools
from engine.loading import load_engine_parts
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.worker import ModelRunner
from kernels._launch import KernelLibrary
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint
from tests.kernels.emulation.library import compiler

PROMPTS = [[7] * 20, [8] * 31, [9] * 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TinyModel())


def run(folder: Path, prompts: list[list[int]], *arguments: str) -> dict[str, Any]:
    streams, context = len(prompts), max(map(len, prompts))
    host = ("--device=cpu", "--kv-cache-gib=0.01")
    work = (f"--model={folder}", f"--streams={streams}", f"--context={context}")
    given = parse([*host, *work, *arguments])
    config, tokens = engine_config(given)
    return measure(load_engine_parts(config), prompts, given.steps, tokens)


def test_every_step_gives_each_stream_a_token(folder: Path) -> None:
    figures = run(folder, PROMPTS, "--steps=5")
    assert figures["decodes_with"] == "PyTorch ops"
    per_second = 3e3 / figures["step_ms"]
    assert figures["tokens_per_second"] == pytest.approx(per_second, rel=1e-2)
    assert "kernels_ms" not in figures, "nothing to add up without a GPU"
    assert "step_by_step" not in figures, "here every step is read before the next is started"


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")
def test_steps_ahead_are_measured_beside_steps_one_by_one(
    tmp_path: Path, emulated_kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the kernels emulated: both loops run over the same parts, one after the
    other, and leave them as they were."""
    model = TinyModel(head_dim=64, block=16, index_dim=8, top_p=0.4)
    folder = write_checkpoint(tmp_path / "model", model)
    monkeypatch.setattr("engine.loading.choose_kernels", lambda *_: emulated_kernels)
    monkeypatch.setattr(ModelRunner, "overlaps", True)
    figures = run(folder, PROMPTS, "--steps=3")
    assert figures["decodes_with"] == "CUDA kernels"
    for found in (figures, figures["step_by_step"]):
        per_second = 3e3 / found["step_ms"]
        assert found["tokens_per_second"] == pytest.approx(per_second, rel=1e-2)


def test_the_first_stream_has_room_for_what_it_decodes_during_other_prefills(
    folder: Path,
) -> None:
    """It used to run past the model length, and so past its block table: on a GPU that ended the
    process with a device-side assertion in the middle of the measurement."""
    prompts = [[7 + i] * 90 for i in range(4)]
    figures = run(folder, prompts, "--steps=5", "--max-batch-tokens=12")
    assert figures["tokens_per_second"] > 0


@pytest.mark.parametrize("batch_tokens", [100, 2048, 16384])
def test_the_room_is_enough_for_the_scheduler(batch_tokens: int) -> None:
    """Eight streams at 16K, in the scheduler alone."""
    streams, context, steps = 8, 16384 if batch_tokens > 100 else 500, 64
    pages = streams * 300
    pools = KvPools(
        full_pages=pages, window_pages=pages, block_tokens=64, window_tokens=512, sink_tokens=4
    )
    scheduler = Scheduler(pools, max_num_seqs=streams, max_batch_tokens=batch_tokens)
    most = stream_tokens(streams * context, streams, steps, batch_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
    requests = [Request(i, [i] * context, params) for i in range(streams)]
    for request in requests:
        scheduler.add(request)
    left = WARM_STEPS + steps + PROFILED_STEPS
    while left:
        left -= all(request.output for request in requests)
        batch = scheduler.schedule()
        scheduler.update(batch, {span.request_id: 1 for span in batch.spans if span.sample})
    generated = [len(request.output) for request in requests]
    assert max(generated) <= most
    assert max(generated) > min(generated), "the first streams decode while others are prefilled"
