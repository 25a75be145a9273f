"""On a GPU host: the same ops, the same engine, the same tokens. Skips itself without CUDA."""

from __future__ import annotations

from array import array

import pytest
import torch

from benchmarks.workload import code_prompt
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.embedded import embedded_model_path
from engine.loading import load_engine_parts
from engine.messages import Add, Attended
from engine.model.config_reader import read_config
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer
from kernels import decode, indexer, prefill, reference
from kernels.block_age import AGE_RANGES
from tests.engine.fake_channel import FakeChannel
from tests.kernels.paged_case import PagedCase, random_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(*values: object) -> list[object]:
    return [v.cuda() if isinstance(v, torch.Tensor) else v for v in values]


def test_decode_ops_equal_the_specification() -> None:
    case = PagedCase.make([1, 64, 33, 100])
    q_RHD, rows = random_tensor(4, 5, 16), torch.tensor([1, 0, 0, 1, 1])
    cache = (case.k_cache, case.v_cache, case.tables_SB, case.lens_S)
    qi_RHI, index_rows = random_tensor(4, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    scored = (qi_RHI, index_rows, case.index_cache, case.tables_SB, case.lens_S)
    log_mass = reference.score_blocks(*scored)
    got_mass = indexer.score_blocks(*on_gpu(*scored))  # type: ignore[arg-type]
    torch.testing.assert_close(got_mass.cpu(), log_mass)
    biased = (*scored, None, 2 * random_tensor(5, AGE_RANGES))
    got_mass = indexer.score_blocks(*on_gpu(*biased))  # type: ignore[arg-type]
    torch.testing.assert_close(got_mass.cpu(), reference.score_blocks(*biased))
    top_p = torch.full((4, 5), 0.6)
    mask = reference.select_blocks(log_mass, top_p, case.lens_S, 8)
    got_mask = indexer.select_blocks(*on_gpu(log_mass, top_p, case.lens_S, 8))  # type: ignore[arg-type]
    assert torch.equal(got_mask.cpu(), mask)
    args = (q_RHD, rows, *cache, mask, 0.25)
    got = decode.decode_sparse(*on_gpu(*args))  # type: ignore[arg-type]
    torch.testing.assert_close(got.cpu(), reference.decode_sparse(*args))
    window = (q_RHD, rows, *cache, 24, 4, 0.25)
    got = decode.decode_windowed(*on_gpu(*window))  # type: ignore[arg-type]
    torch.testing.assert_close(got.cpu(), reference.decode_windowed(*window))


def test_prefill_ops_equal_the_specification() -> None:
    case = PagedCase.make([9, 100, 33])
    starts, rows = torch.tensor([0, 1, 38, 71]), torch.tensor([1, 0, 1])
    q_THD = random_tensor(71, 3, 16)
    args = (q_THD, rows, case.k_cache, case.v_cache, case.tables_SB, starts, case.lens_S)
    got = prefill.prefill_dense(*on_gpu(*args, 0.25))  # type: ignore[arg-type]
    torch.testing.assert_close(got.cpu(), reference.prefill_dense(*args, 0.25))
    got = prefill.prefill_windowed(*on_gpu(*args, 24, 4, 0.25))  # type: ignore[arg-type]
    torch.testing.assert_close(got.cpu(), reference.prefill_windowed(*args, 24, 4, 0.25))


def generate(device: str, dtype: str, prompts: list[list[int]]) -> tuple[list[list[int]], Attended]:
    """Greedy tokens of an engine in this process, and the last request's token budget."""
    config = EngineConfig(
        model=str(embedded_model_path()),
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # one of its literals
        kv_cache_bytes=2**30,
        max_num_seqs=len(prompts),
    )
    parts = load_engine_parts(config)
    channel = FakeChannel()
    core = EngineCore(parts.scheduler, parts.runner, channel)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for request_id, prompt in enumerate(prompts):
        ids = array("i", prompt).tobytes()
        channel.inbox.append(Add(request_id=request_id, params=params, prompt=ids, arrival=0.0))
    tokens: list[list[int]] = [[] for _ in prompts]
    attended = Attended()
    open_requests = len(prompts)
    while open_requests:
        core.turn()
        for report in channel.reports:
            for update in report.updates:
                tokens[update.request_id] += update.tokens
                open_requests -= update.finish_reason is not None
                attended = update.attended or attended
        channel.reports.clear()
    return tokens, attended


def test_greedy_tokens_in_float32_equal_the_cpus() -> None:
    tokenizer = Tokenizer.from_folder(embedded_model_path())
    prompts = [code_prompt(tokenizer, length, seed) for seed, length in enumerate((3000, 700, 5))]
    on_cpu, _ = generate("cpu", "float32", prompts)
    on_cuda, attended = generate("cuda", "float32", prompts)
    assert on_cuda == on_cpu
    assert attended is not None


def test_bfloat16_runs_sparsely() -> None:
    tokenizer = Tokenizer.from_folder(embedded_model_path())
    tokens, attended = generate("cuda", "bfloat16", [code_prompt(tokenizer, 8192, 1)])
    assert len(tokens[0]) == 24
    sparse = read_config(embedded_model_path()).sparse
    assert sparse is not None
    heads = sum(map(len, sparse.retrieval_heads))
    assert attended.pairs == 23 * heads, "every retrieval head at every decode step"
    assert 0 < attended.fraction / attended.pairs < 1
