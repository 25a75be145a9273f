"""Prompt tokens through the door of the prefill kernels give what the PyTorch ops give.

Behind the door stands the specification, which holds its caller to the kernels' layout, or Triton's
kernels under their interpreter. On a GPU, tests/gpu/test_engine_prefill.py does the same.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels._launch import KernelError
from kernels.cuda_prefill import check_strides
from kernels.device_prefill import DevicePrefill
from kernels.prefill_tiles import PrefillTiles
from kernels.span_inputs import SpanInputs
from tests.engine.head_map_model import make_model
from tests.engine.paged_driver import RAGGED, Driver, ragged_outputs
from tests.engine.test_attention import LAYOUTS

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU host the kernels run compiled"
)


class Specification:
    """What `DevicePrefill` computes, by `kernels.reference`."""

    name = "specified"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def attend_windowed(self, inputs: SpanInputs, window: int, sinks: int, scale: float) -> None:
        self._write("windowed", inputs, reference.prefill_windowed, window, sinks, scale)

    def attend_dense(self, inputs: SpanInputs, scale: float) -> None:
        self._write("dense", inputs, reference.prefill_dense, scale)

    def attend_sparse(
        self,
        inputs: SpanInputs,
        tiles: PrefillTiles,
        qi_TGI: Tensor,
        index_row_G: Tensor,
        index_cache: Tensor,
        top_p_G: Tensor,
        dense_from_S: Tensor,
        dense_below: int,
        scale: float,
        index_scales: Tensor | None = None,
        age_bias_GA: Tensor | None = None,
    ) -> None:
        tables_SB, block = inputs.block_tables_SB, inputs.k_cache.shape[2]
        index = (index_row_G, index_cache, tables_SB, tiles, index_scales, age_bias_GA)
        shares = reference.score_tiles(qi_TGI, *index)
        rule = (top_p_G, tiles, dense_from_S, dense_below, block)
        mask_ZGB = reference.select_tiles(shares, *rule)

        def attend(q: Tensor, rows: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            return reference.prefill_sparse(q, rows, k, v, tables_SB, tiles, mask_ZGB, scale)

        self._write("sparse", inputs, attend)

    def _write(self, call: str, inputs: SpanInputs, twin: Any, *rule: object) -> None:
        inputs.check()
        check_strides(inputs)
        assert inputs.out_THD.data_ptr() != inputs.q_THD.data_ptr()
        q_TGD = inputs.q_THD[:, inputs.heads_G]
        inputs.out_THD[:, inputs.heads_G] = twin(q_TGD, *inputs[3:], *rule)
        self.calls[call] += 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ragged_batches_equal_naive_masks(layout: dict[str, Any]) -> None:
    """Chunks of any origin beside decode rows and replays, which keep their own rule."""
    kernels = Specification()
    driver = Driver(make_model(**layout), RAGGED, prefill_kernels=kernels)
    for index, got in enumerate(ragged_outputs(driver)):
        torch.testing.assert_close(got, driver.expected(index))
    steps_with_prompts = 4
    roles = sum(
        bool(heads.retrieval) + bool(heads.local_on_full) + bool(heads.local_on_windowed)
        for heads in driver.heads
    )
    assert kernels.calls.total() == roles * steps_with_prompts, "one call a role, for all spans"


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
@pytest.mark.parametrize(
    "layout", ["mixed-groups", "index-per-kv-head", "dense-below", "bias-by-age"]
)
def test_sparse_prompts_equal_those_of_the_ops(layout: str, index_dtype: str) -> None:
    model = make_model(**LAYOUTS[layout] | {"top_p": 0.3})
    kernels = Specification()
    given: dict[str, Any] = {"prefill_attention": "sparse", "prompt_tokens": 400}
    given["index_dtype"] = index_dtype
    got = ragged_outputs(Driver(model, RAGGED, prefill_kernels=kernels, **given))
    want = ragged_outputs(Driver(model, RAGGED, **given))
    torch.testing.assert_close(got, want)
    dense = ragged_outputs(Driver(model, RAGGED))
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(got, dense, strict=True))
    assert kernels.calls["sparse"] > 0
    assert kernels.calls["dense"] == 0


def test_layers_without_an_index_are_dense_in_a_sparse_prefill() -> None:
    kernels = Specification()
    model = make_model([[0, 3]], index_dim=None)
    driver = Driver(model, [(30, 30)], prefill_kernels=kernels, prefill_attention="sparse")
    driver.step([(0, 30, "prefill")])
    assert set(kernels.calls) == {"dense", "windowed"}


def test_a_sequence_full_of_nan_spoils_no_other() -> None:
    driver = Driver(make_model([[0, 3]]), [(40, 44), (40, 44)], prefill_kernels=Specification())
    for name in ("q_pre", "k_pre", "q", "k", "v"):
        getattr(driver.sequences[0], name).fill_(torch.nan)
    prefill = driver.step([(0, 40, "prefill"), (1, 40, "prefill")])[1]
    torch.testing.assert_close(prefill, driver.expected(1)[:, :40])


@interpreted
@pytest.mark.parametrize("mode", ["dense", "sparse", "sparse-with-a-bias"])
def test_tritons_kernels_in_the_engine(mode: Any) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = DevicePrefill(CPU, torch.float32, 16, 16, None)
    sizes: dict[str, Any] = {"dim": 16, "index_dim": 16, "block": 16, "window": 21, "top_p": 0.3}
    model = make_model([[0, 3]], **sizes, age_bias=mode == "sparse-with-a-bias")
    given: dict[str, Any] = {"prefill_attention": mode.split("-")[0], "prompt_tokens": 400}
    takes: Any = [(0, 20, "prefill")], [(0, 30, "prefill"), (1, 33, "prefill")]
    outputs = []
    for found in (kernels, None):
        driver = Driver(model, [(50, 50), (33, 33)], prefill_kernels=found, **given)
        outputs.append([out for step in takes for out in driver.step(step)])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=2e-6)


@interpreted
def test_kernels_are_tried_out_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = DevicePrefill(CPU, torch.float32, 16, 16, None)
    assert kernels.name == "Triton"
    kernels.try_out(16)
    kernels.try_out(16, has_age_bias=True)
    with pytest.raises(ValueError, match="index_dim 8"):
        kernels.try_out(8)
    monkeypatch.setattr("kernels.prefill_triton.attend_spans", lambda *_: None)
    with pytest.raises(KernelError, match="wrong results"):
        kernels.try_out(None)


def test_what_a_sparse_prefill_takes_is_counted() -> None:
    kernels = object.__new__(DevicePrefill)
    tiles = 2048 // 128 + 8
    scored = tiles * 5 * 512
    assert kernels.workspace_bytes(2048, 8, 5, 512) == scored * (4 * 16 + 10)
    assert kernels.workspace_bytes(2048, 8, 0, 512) == 0
    assert kernels.workspace_bytes(8192, 32, 32, 16384) < 2**30 + 2**32, "masses are bounded"
