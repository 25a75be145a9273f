"""The Triton prefill kernel under its interpreter against the specification, in float32."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import reference
from tests.kernels.span_case import SPANS, WINDOWS, SpanCase

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU host the kernels run compiled: see tests/gpu", allow_module_level=True)

from kernels.prefill_triton import TileConfig, attend_spans
from kernels.span_inputs import EVERYTHING


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_window_and_sinks(spans: list[tuple[int, int]], window: int, sinks: int) -> None:
    case = SpanCase.make(spans, window=window, sinks=sinks)
    out_THD = case.poisoned()
    attend_spans(case.inputs(out_THD), window, sinks, 0.25, TileConfig(32, 4, 1))
    case.check_heads(out_THD, reference.prefill_windowed(*case.twin_arguments, window, sinks, 0.25))


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_dense(spans: list[tuple[int, int]]) -> None:
    case = SpanCase.make(spans)
    out_THD = case.poisoned()
    attend_spans(case.inputs(out_THD), EVERYTHING, 0, 0.25)
    case.check_heads(out_THD, reference.prefill_dense(*case.twin_arguments, 0.25))


def test_pages_that_no_tile_fits_are_refused() -> None:
    case = SpanCase.make([(9, 9)], block=8)
    with pytest.raises(ValueError, match="no kernel for pages of 8 tokens with head_dim 16"):
        attend_spans(case.inputs(case.poisoned()), 4, 1, 0.25)


def test_a_head_map_of_other_length_is_refused() -> None:
    case = SpanCase.make([(9, 9)])
    inputs = case.inputs(case.poisoned())._replace(kv_row_G=torch.tensor([0]))
    with pytest.raises(ValueError, match="kv_row must be"):
        attend_spans(inputs, 4, 1, 0.25)
