"""On a GPU host: sparse prefill's kernels against PyTorch ops. Skips itself without CUDA.

python -m pytest tests/gpu/test_prefill_sparse.py
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kernels import prefill_sparse
from kernels._build import default_cache, find_library
from kernels._launch import KernelLibrary
from kernels.block_age import AGE_RANGES
from kernels.cuda_prefill import BlockLists
from kernels.paged_kv import quantise_index_keys
from kernels.prefill_tiles import PrefillTiles
from tests.kernels.paged_case import random_tensor
from tests.kernels.span_case import SpanCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SPANS = {
    "one-token": [(1, 1)],
    "edges": [(127, 127), (128, 128), (129, 129), (64, 64)],
    "chunks": [(700, 300), (256, 128), (321, 1), (1000, 129)],
    "long": [(9000, 2049), (65, 65)],
}
KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("cuda", torch.bfloat16)],
    ids=["triton-f32", "triton-bf16", "cuda-bf16"],
)


@cache
def library() -> KernelLibrary:
    return KernelLibrary(find_library(default_cache()))


def tiles_of(case: SpanCase) -> PrefillTiles:
    starts, lens = case.starts.tolist(), case.pages.lens_S.tolist()
    return PrefillTiles.of_spans(starts, lens, case.starts.device)


@pytest.mark.parametrize("spans", SPANS.values(), ids=list(SPANS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_shares(spans: list[tuple[int, int]], dtype: torch.dtype) -> None:
    from kernels.device_sparse_prefill import score_tiles

    case = SpanCase.make(spans, block=64, dim=64, dtype=dtype, device="cuda")
    tiles = tiles_of(case)
    pages = len(case.pages.index_cache)
    keys = random_tensor(pages, 3, 64, 16).to("cuda", dtype)
    qi_THI = random_tensor(len(case.q_THD), 2, 16, seed=3).to("cuda", dtype)
    rows, tables_SB = torch.tensor([2, 0], device="cuda"), case.pages.tables_SB
    got = score_tiles(qi_THI, rows, keys, tables_SB, tiles)
    want = prefill_sparse.score_tiles(qi_THI.float(), rows, keys.float(), tables_SB, tiles)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    steps, scales = quantise_index_keys(keys.flatten(0, 1))
    rounded = (rows, steps.view(keys.shape), tables_SB, tiles, scales.view(keys.shape[:3]))
    got = score_tiles(qi_THI, *rounded)
    want = prefill_sparse.score_tiles(qi_THI.float(), *rounded)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    bias_HA = 2 * random_tensor(2, AGE_RANGES, seed=4).to("cuda")
    got = score_tiles(qi_THI, *rounded, bias_HA)
    want = prefill_sparse.score_tiles(qi_THI.float(), *rounded, bias_HA)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_lists() -> None:
    """As many blocks as a long prompt has, and a threshold in any bin."""
    from kernels.device_sparse_prefill import choose_lists

    tiles = PrefillTiles.of_spans([0, 4096, 4100], [2**20, 70000], torch.device("cuda"))
    shares = 3 * random_tensor(tiles.count, 3, 2**14).to("cuda") - 9
    ends = torch.tensor([2**20 - 128, 2**21], device="cuda")
    rule = (torch.tensor([0.2, 0.9, 0.99], device="cuda"), tiles, ends, 0, 64)
    lists = choose_lists(shares, *rule)
    want = BlockLists.of_mask(prefill_sparse.select_tiles(shares, *rule))
    assert torch.equal(lists.counts, want.counts)
    past_ZHB = torch.arange(2**14, device="cuda") >= want.counts.unsqueeze(-1)
    assert torch.equal(lists.blocks.masked_fill(past_ZHB, 0), want.blocks.masked_fill(past_ZHB, 0))


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0], ids=["forced", "some", "all"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spans", SPANS.values(), ids=list(SPANS))
@KERNELS
def test_attention_to_lists(
    spans: list[tuple[int, int]], dim: int, share: float, kernel: str, dtype: torch.dtype
) -> None:
    from kernels.device_sparse_prefill import attend_lists

    if kernel == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CUDA kernel is for compute capability 9.0")
    case = SpanCase.make(spans, block=64, dim=dim, dtype=dtype, device="cuda")
    tiles = tiles_of(case)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (tiles.count, 2, case.pages.tables_SB.shape[1])
    wanted = torch.rand(shape, generator=generator, device="cuda") < share
    shares = torch.zeros(shape, device="cuda").masked_fill(~wanted, -torch.inf)
    rule = (torch.full((2,), 0.999, device="cuda"), tiles, case.pages.lens_S, 0, 64)
    mask_ZHB = prefill_sparse.select_tiles(shares, *rule)
    lists = BlockLists.of_mask(mask_ZHB)
    outputs = []
    for _ in range(3):
        out_THD = case.poisoned()
        its_library = library() if kernel == "cuda" else None
        attend_lists(its_library, case.inputs(out_THD), tiles, lists, dim**-0.5)
        outputs.append(out_THD[:, case.heads_G])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])

    def twin(of: SpanCase) -> torch.Tensor:
        q, rows, k_cache, v_cache, tables, _, _ = of.twin_arguments
        arguments = (q, rows, k_cache, v_cache, tables, tiles, mask_ZHB, dim**-0.5)
        return prefill_sparse.prefill_sparse(*arguments).float()

    truth = twin(case.to(torch.float32, "cuda"))
    if dtype == torch.float32:
        torch.testing.assert_close(outputs[0], truth, rtol=1e-4, atol=1e-5)
        return
    allowed = 2 * float((twin(case) - truth).abs().max()) + 1e-5
    assert float((outputs[0].float() - truth).abs().max()) <= allowed
