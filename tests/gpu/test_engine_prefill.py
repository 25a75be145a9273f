"""On a GPU host: prompts of the engine on the prefill kernels. Skips itself without CUDA.

python -m pytest tests/gpu/test_engine_prefill.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.step import EngineParts
from engine.transfer import Readback
from engine.worker import ModelRunner
from tests.gpu.test_engine_cuda import load, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LENGTHS = (3000, 700, 5, 1300)
CHUNKS = (1111, 8192)  # tokens of a step: cut inside pages and tiles, and not at all


@torch.inference_mode()
def hidden_states(parts: EngineParts) -> Tensor:
    """Of every prompt token after the last layer, float32 [tokens, E]; prompts in their order."""
    runner = parts.runner
    assert isinstance(runner, ModelRunner)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    requests = {i: Request(i, prompt, params) for i, prompt in enumerate(prompts(LENGTHS))}
    rows: dict[int, list[Tensor]] = {i: [] for i in requests}
    for request in requests.values():
        parts.scheduler.add(request)
    while any(request.is_prefill for request in requests.values()):
        batch = parts.scheduler.schedule()
        hidden_TE = runner._start_mixed(batch, requests, Readback()).hidden_TE
        assert hidden_TE is not None
        counts = [len(span.tokens) for span in batch.spans]
        for span, part_TE in zip(batch.spans, torch.split(hidden_TE, counts), strict=True):
            rows[span.request_id].append(part_TE.float())
        parts.scheduler.update(batch, {})
        for span in batch.spans:
            if span.sample:
                parts.scheduler.finish(span.request_id)
    return torch.cat([part for parts_of_one in rows.values() for part in parts_of_one])


def run(*, chunk: int = CHUNKS[0], **settings: Any) -> tuple[Tensor, str]:
    parts = load(max_batch_tokens=chunk, **settings)
    assert isinstance(parts.runner, ModelRunner)
    return hidden_states(parts), parts.runner.prefills_with


@pytest.fixture(scope="module")
def truth_TE() -> Tensor:
    """By the PyTorch ops in float32."""
    return run(dtype="float32", kernels="torch")[0]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_float32_equals_the_ops(truth_TE: Tensor, chunk: int) -> None:
    got_TE, name = run(dtype="float32", chunk=chunk)
    assert name == "Triton kernels"
    torch.testing.assert_close(got_TE, truth_TE, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_bfloat16_errs_at_most_twice_as_much_as_the_ops(truth_TE: Tensor, chunk: int) -> None:
    got_TE, name = run(dtype="bfloat16", chunk=chunk)
    twin_TE, _ = run(dtype="bfloat16", chunk=chunk, kernels="torch")
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert name == ("CUDA kernels" if is_hopper else "Triton kernels")
    mine, its = ((x - truth_TE).abs() for x in (got_TE, twin_TE))
    assert float(mine.max()) <= 2 * float(its.max())
    assert float(mine.square().mean()) <= 2 * float(its.square().mean())


def test_sparse_prompts_equal_those_of_the_ops() -> None:
    """A block whose share lies on the threshold may fall to the other side in the last digit."""
    given: dict[str, Any] = {"dtype": "float32", "prefill_attention": "sparse"}
    got_TE, name = run(**given)
    assert name == "Triton kernels"
    want_TE, _ = run(**given, kernels="torch")
    near_T = (got_TE - want_TE).abs().amax(-1) < 1e-2
    assert float(near_T.float().mean()) > 0.97
