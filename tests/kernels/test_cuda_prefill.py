"""The prefill kernel for Hopper without a GPU: its source, run on the CPU, against its twin.

Its loads come at random times and its threads run in random order; see `emulation`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import cuda_prefill, prefill, reference
from kernels._launch import KernelError, KernelLibrary
from kernels.cuda_prefill import BlockLists, SpanArgs
from kernels.prefill_tiles import PrefillTiles
from kernels.span_inputs import EVERYTHING
from tests.kernels.emulation.library import compiler
from tests.kernels.span_case import SpanCase

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

# (context length, query tokens) of each span
SPANS = {
    "one-token": [(1, 1)],
    "tile-edges": [(127, 127), (129, 129), (64, 64)],
    "chunks": [(700, 131), (321, 1), (257, 128)],
}
WINDOWS = [(1, 0), (65, 64), (130, 4), (300, 150), (EVERYTHING, 0)]


def case_of(spans: list[tuple[int, int]], dim: int = 64) -> SpanCase:
    return SpanCase.make(spans, block=64, dim=dim, dtype=torch.bfloat16)


def check(case: SpanCase, out_THD: Tensor, truth_TGD: Tensor, twin_TGD: Tensor) -> None:
    """At most twice as far off as PyTorch in bfloat16; other heads are as they were."""
    got_TGD = out_THD[:, case.heads_G].float()
    allowed = 2 * float((twin_TGD.float() - truth_TGD).abs().max()) + 1e-5
    assert float((got_TGD - truth_TGD).abs().max()) <= allowed
    others = torch.ones(out_THD.shape[1], dtype=torch.bool)
    others[case.heads_G] = False
    assert out_THD[:, others].isnan().all()


def check_rule(
    case: SpanCase, out_THD: Tensor, window: int, sinks: int = 0, scale: float = 0.125
) -> None:
    exact = case.to(torch.float32).twin_arguments
    rounded = case.to(torch.bfloat16, clean=True).twin_arguments
    check(
        case,
        out_THD,
        reference.prefill_windowed(*exact, window, sinks, scale),
        prefill.prefill_windowed(*rounded, window, sinks, scale),
    )


@dataclass(frozen=True)
class Taken:
    """What the counter of a launch held before and after it, and the tiles of all heads."""

    before: int
    after: int
    tiles: int


@pytest.fixture
def launches(
    emulated_kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> list[Taken | None]:
    """One entry for each launch of the test, None for those that have no counter."""
    launch, seen = emulated_kernels.launch_prefill, list[Taken | None]()

    def watched(args: SpanArgs, like: Tensor) -> None:
        if args.taken is None:
            launch(args, like)
            seen.append(None)
            return
        counter = ctypes.c_uint32.from_address(args.taken)
        before = counter.value
        launch(args, like)
        seen.append(Taken(before, counter.value, args.tiles * args.group))

    monkeypatch.setattr(emulated_kernels, "launch_prefill", watched)
    return seen


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_spans(
    emulated_kernels: KernelLibrary, spans: list[tuple[int, int]], window: int, sinks: int
) -> None:
    case = SpanCase.make(spans, window=window, sinks=sinks, block=64, dim=64, dtype=torch.bfloat16)
    out_THD = case.poisoned()
    cuda_prefill.attend_spans(emulated_kernels, case.inputs(out_THD), window, sinks, 0.125)
    check_rule(case, out_THD, window, sinks)


@pytest.mark.parametrize(("window", "seed"), [(200, 1), (EVERYTHING, 2)])
def test_the_order_of_threads_and_loads_does_not_matter(
    emulated_kernels: KernelLibrary, window: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of([(500, 260)], dim=128)
    outputs = []
    for order in (0, seed):
        # The emulation takes the stream's handle as the seed of its order.
        monkeypatch.setattr("kernels._launch.stream_of", lambda _, order=order: order)
        outputs.append(case.poisoned())
        cuda_prefill.attend_spans(emulated_kernels, case.inputs(outputs[-1]), window, 4, 0.1)
    assert torch.equal(outputs[0][:, case.heads_G], outputs[1][:, case.heads_G])
    check_rule(case, outputs[1], window, 4, 0.1)


@pytest.mark.parametrize(
    ("spans", "heads", "tiles"),
    [([(1, 1)], [2], 1), ([(150, 130)], [1], 2), ([(300, 260), (5, 5)], [3, 0], 8)],
    ids=["one-tile", "fewer-than-ctas", "more-than-ctas"],
)
def test_each_tile_is_taken_from_the_counter_once(
    emulated_kernels: KernelLibrary,
    launches: list[Taken | None],
    spans: list[tuple[int, int]],
    heads: list[int],
    tiles: int,
) -> None:
    """Every CTA asks once for each tile that it is done with, be it one that no span has."""
    rows = [1, 0][: len(heads)]
    case = SpanCase.make(spans, heads=heads, kv_rows=rows, block=64, dim=64, dtype=torch.bfloat16)
    out_THD = case.poisoned()
    cuda_prefill.attend_spans(emulated_kernels, case.inputs(out_THD), EVERYTHING, 0, 0.125)
    assert launches == [Taken(0, tiles, tiles)]
    check_rule(case, out_THD, EVERYTHING)


def test_launches_of_other_sizes_and_kinds_follow_each_other(
    emulated_kernels: KernelLibrary, launches: list[Taken | None]
) -> None:
    """Each begins with a counter of its own at 0, whatever those before have left."""
    large, small = case_of([(200, 131), (64, 64)]), case_of([(3, 2)])
    windows = [EVERYTHING, EVERYTHING, 100, EVERYTHING]
    for case, window in zip([large, small, large, large], windows, strict=True):
        out_THD = case.poisoned()
        cuda_prefill.attend_spans(emulated_kernels, case.inputs(out_THD), window, 0, 0.125)
        check_rule(case, out_THD, window)
    assert launches == [Taken(0, 6, 6), Taken(0, 2, 2), None, Taken(0, 6, 6)]


@pytest.mark.parametrize(
    "limit", [{"tiles": 2**31}, {"window": 2**30 + 1}, {"sinks": 2**30 + 1}], ids=str
)
def test_numbers_that_the_kernel_cannot_hold_are_refused(
    emulated_kernels: KernelLibrary, limit: dict[str, int]
) -> None:
    args = SpanArgs(**{"tiles": 1, "group": 1, "head_dim": 64, **limit})
    with pytest.raises(KernelError, match="span_prefill"):
        emulated_kernels.launch_prefill(args, torch.empty(0))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["forced", "some", "all"])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_lists(
    emulated_kernels: KernelLibrary,
    launches: list[Taken | None],
    spans: list[tuple[int, int]],
    share: float,
) -> None:
    case = case_of(spans)
    lens_S, tables_SB = case.pages.lens_S, case.pages.tables_SB
    tiles = PrefillTiles.of_spans(case.starts.tolist(), lens_S.tolist())
    generator = torch.Generator().manual_seed(1)
    wanted = torch.rand((tiles.count, 2, tables_SB.shape[1]), generator=generator) < share
    shares = torch.zeros(wanted.shape).masked_fill(~wanted, -torch.inf)
    top_p = torch.full((2,), 0.999)
    mask_ZHB = reference.select_tiles(shares, top_p, tiles, lens_S, 0, 64)
    lists = BlockLists.of_mask(mask_ZHB)
    out_THD = case.poisoned()
    args = (case.inputs(out_THD), EVERYTHING, 0, 0.125)
    cuda_prefill.attend_spans(emulated_kernels, *args, lists)
    taken = 2 * cuda_prefill.tile_count(case.q_THD.shape[0], len(spans))
    assert launches == [Taken(0, taken, taken)]

    def twin(of: SpanCase) -> Tensor:
        queries, rows, k_cache, v_cache, tables, _, _ = of.twin_arguments
        pages = (k_cache, v_cache, tables)
        return reference.prefill_sparse(queries, rows, *pages, tiles, mask_ZHB, 0.125)

    rounded = twin(case.to(torch.bfloat16, clean=True))
    check(case, out_THD, twin(case.to(torch.float32)), rounded)
