"""On a GPU host: the prefill kernels against the specification. Skips itself without CUDA.

    python -m pytest tests/gpu/test_prefill.py

Inputs are small and ugly, or a layer of 32 query and 4 KV heads at tens of thousands of tokens, for
which PyTorch's ops in float32 are the truth. Outputs are poisoned, and so is every place of the
caches where nothing was stored.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kernels import cuda_prefill, prefill, reference
from kernels._build import default_cache, find_library
from kernels._launch import KernelLibrary
from kernels.prefill_triton import SWEEP, TileConfig, attend_spans
from kernels.span_inputs import EVERYTHING
from tests.kernels.span_case import SpanCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("cuda", torch.bfloat16)],
    ids=["triton-f32", "triton-bf16", "cuda-bf16"],
)
BOTH = pytest.mark.parametrize("kernel", ["triton", "cuda"])
# (context length, query tokens) of each span; pages hold 64 tokens
UGLY = {
    "one-token": [(1, 1)],
    "last-token": [(65, 1)],
    "tile-edges": [(127, 127), (128, 128), (129, 129), (64, 64), (63, 63)],
    "chunks": [(700, 300), (256, 128), (257, 128), (321, 1)],
    "ragged": [(8, 8), (17, 1), (590, 237), (133, 133), (1, 1), (400, 129)],
}
WINDOWS = [(1, 0), (1, 4), (64, 0), (65, 64), (100, 1), (128, 4), (250, 200), (EVERYTHING, 0)]


@cache
def library() -> KernelLibrary:
    return KernelLibrary(find_library(default_cache()))


def run(case: SpanCase, window: int, sinks: int, kernel: str = "triton") -> torch.Tensor:
    out_THD = case.poisoned()
    scale = case.q_THD.shape[2] ** -0.5
    if kernel == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the CUDA kernel is for compute capability 9.0")
        cuda_prefill.attend_spans(library(), case.inputs(out_THD), window, sinks, scale)
    else:
        attend_spans(case.inputs(out_THD), window, sinks, scale)
    return out_THD


def check_twice_the_twin(got: torch.Tensor, twin: torch.Tensor, truth: torch.Tensor) -> None:
    allowed = 2 * float((twin.float() - truth).abs().max()) + 1e-5
    worst = float((got.float() - truth).abs().max())
    assert worst <= allowed, f"error {worst:.2e}, twice the PyTorch op's is {allowed:.2e}"


def check_against_reference(case: SpanCase, out_THD: torch.Tensor, window: int, sinks: int) -> None:
    """float32 to rounding; bfloat16 at most twice as far off as PyTorch's own arithmetic in it."""
    scale = case.q_THD.shape[2] ** -0.5
    exact = case.to(torch.float32, "cpu").twin_arguments
    truth_TGD = reference.prefill_windowed(*exact, window, sinks, scale)
    got_TGD = out_THD[:, case.heads_G].cpu().float()
    if out_THD.dtype == torch.float32:
        torch.testing.assert_close(got_TGD, truth_TGD, rtol=1e-4, atol=1e-5)
    else:
        rounded = case.to(out_THD.dtype, "cpu", clean=True).twin_arguments
        twin_TGD = prefill.prefill_windowed(*rounded, window, sinks, scale)
        check_twice_the_twin(got_TGD, twin_TGD, truth_TGD)
    others = torch.ones(out_THD.shape[1], dtype=torch.bool)
    others[case.heads_G.cpu()] = False
    assert out_THD[:, others].isnan().all()


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("spans", UGLY.values(), ids=UGLY)
@KERNELS
def test_spans(
    spans: list[tuple[int, int]], window: int, sinks: int, kernel: str, dtype: torch.dtype
) -> None:
    case = SpanCase.make(
        spans, window=window, sinks=sinks, block=64, dim=128, dtype=dtype, device=DEVICE
    )
    check_against_reference(case, run(case, window, sinks, kernel), window, sinks)


@pytest.mark.parametrize("config", SWEEP, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_configuration(dim: int, config: TileConfig) -> None:
    case = SpanCase.make(
        UGLY["ragged"], window=130, sinks=4, block=64, dim=dim, dtype=torch.bfloat16, device=DEVICE
    )
    out_THD = case.poisoned()
    attend_spans(case.inputs(out_THD), 130, 4, dim**-0.5, config)
    check_against_reference(case, out_THD, 130, 4)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_page_sizes(dtype: torch.dtype, block: int) -> None:
    case = SpanCase.make(
        UGLY["chunks"], window=130, sinks=4, block=block, dim=64, dtype=dtype, device=DEVICE
    )
    check_against_reference(case, run(case, 130, 4), 130, 4)


def test_the_cuda_kernel_with_head_dim_64() -> None:
    case = SpanCase.make(
        UGLY["ragged"], window=130, sinks=4, block=64, dim=64, dtype=torch.bfloat16, device=DEVICE
    )
    check_against_reference(case, run(case, 130, 4, "cuda"), 130, 4)


def large_layer(spans: list[tuple[int, int]]) -> SpanCase:
    """A layer of Qwen3-30B-A3B."""
    local = [head for head in range(32) if head not in (0, 8, 16, 24, 25)]
    return SpanCase.make(
        spans,
        heads=local,
        kv_rows=[head // 8 for head in local],
        layer_heads=32,
        kv_heads=4,
        block=64,
        dim=128,
        dtype=torch.bfloat16,
        device=DEVICE,
    )


@pytest.mark.parametrize("window", [8192, EVERYTHING], ids=["window", "dense"])
@BOTH
def test_a_large_layer_and_ten_repeats(kernel: str, window: int) -> None:
    case = large_layer([(20000, 9000), (12321, 12321), (3, 3)])
    out_THD = run(case, window, 4, kernel)
    scale = 128**-0.5
    exact = case.to(torch.float32, clean=True).twin_arguments
    truth_TGD = prefill.prefill_windowed(*exact, window, 4, scale)
    rounded = case.to(torch.bfloat16, clean=True).twin_arguments
    twin_TGD = prefill.prefill_windowed(*rounded, window, 4, scale)
    check_twice_the_twin(out_THD[:, case.heads_G], twin_TGD, truth_TGD)
    for _ in range(9):
        again_THD = run(case, window, 4, kernel)
        assert torch.equal(again_THD[:, case.heads_G], out_THD[:, case.heads_G])


def test_launches_in_a_row_and_on_two_streams_do_not_disturb_each_other() -> None:
    """Each has a counter of its own, whatever its size and the stream that it is on."""
    large = SpanCase.make([(3000, 3000)], block=64, dim=128, dtype=torch.bfloat16, device=DEVICE)
    small = SpanCase.make([(700, 300)], block=64, dim=128, dtype=torch.bfloat16, device=DEVICE)
    calls = [(large, EVERYTHING), (small, EVERYTHING), (large, 200), (small, 200)]
    expected = [run(case, window, 4, "cuda")[:, case.heads_G] for case, window in calls]
    streams = [
        torch.cuda.Stream(),  # type: ignore[no-untyped-call]  # torch's own
        torch.cuda.Stream(),  # type: ignore[no-untyped-call]
    ]
    torch.cuda.synchronize()
    outputs = []
    order = [(turn + turn // 8) % 4 for turn in range(40)]  # each call comes on both streams
    for turn, which in enumerate(order):
        case, window = calls[which]
        with torch.cuda.stream(streams[turn % 2]):
            outputs.append(run(case, window, 4, "cuda"))
    torch.cuda.synchronize()
    for which, out_THD in zip(order, outputs, strict=True):
        assert torch.equal(out_THD[:, calls[which][0].heads_G], expected[which])


@BOTH
def test_what_others_left_behind_does_not_leak(kernel: str) -> None:
    """Pages that slid out of the window are given to others while the table still names them."""
    case = SpanCase.make([(900, 70)], block=64, dim=128, dtype=torch.bfloat16, device=DEVICE)
    before_THD = run(case, 200, 4, kernel)
    for kept in (case.pages.k_cache, case.pages.v_cache):
        kept[case.pages.tables_SB[0, 1:9]] = torch.nan
    after_THD = run(case, 200, 4, kernel)
    assert torch.equal(after_THD[:, case.heads_G], before_THD[:, case.heads_G])
