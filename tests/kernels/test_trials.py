"""Kernels tried out before they serve: good ones pass, and one wrong number is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import trial
from kernels._launch import KernelError, KernelLibrary
from kernels.decode_trial import try_decode
from kernels.layer_trial import LayerKind, try_layers
from kernels.step_trial import try_step
from kernels.trial import DeviceFaultError, TrialError, check_close, check_equal, on_trial
from kernels.trial_layer import DecodeKind, TrialLayer
from tests.kernels.emulation.library import compiler
from tests.kernels.trial_case import break_kernel

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")

DECODE = DecodeKind(
    dtype=torch.float32,
    head_dim=64,
    group=2,
    block_tokens=16,
    has_local=True,
    window=40,
    sinks=3,
    index_dim=8,
)
BF16_INT8 = replace(DECODE, dtype=torch.bfloat16, index_dtype=torch.int8)
BIASED = replace(DECODE, has_age_bias=True)
DENSE = replace(DECODE, has_local=False, index_dim=None)
LAYERS = LayerKind(
    attention=DECODE,
    is_normed=True,
    hidden_size=64,
    inner_sizes=(96, 48),
    experts=6,
    chosen=2,
    normalise=True,
)


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@needs_compiler
@pytest.mark.parametrize(
    "kind",
    [
        BF16_INT8,
        BIASED,
        replace(DECODE, dtype=torch.bfloat16, index_dim=None, group=1),
        DENSE,
    ],
    ids=["bf16-int8", "bias-by-age", "no-index", "dense-f32"],
)
def test_good_decode_kernels_pass(library: KernelLibrary, kind: DecodeKind) -> None:
    try_decode(library, kind, CPU)


@needs_compiler
@pytest.mark.parametrize(
    "kind",
    [
        LAYERS,
        replace(LAYERS, attention=replace(BF16_INT8, head_dim=128, index_dim=16)),
        replace(LAYERS, attention=DENSE, experts=0, is_normed=False),
    ],
    ids=["f32", "bf16-int8", "dense"],
)
def test_good_layer_kernels_pass(library: KernelLibrary, kind: LayerKind) -> None:
    try_layers(library, kind, CPU)
    try_step(library, kind.attention.dtype, kind.attention.block_tokens, 501, kind.hidden_size, CPU)


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "field"),
    [("index_select", "log_mass"), ("index_select", "attended"), ("sparse_decode", "out")],
)
def test_a_wrong_number_of_decode_is_found(
    library: KernelLibrary, kernel: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernel(monkeypatch, library, kernel, field)
    with pytest.raises(TrialError, match=f"^{kernel} gives wrong results on this device: off by"):
        try_decode(library, DECODE, CPU)


@needs_compiler
@pytest.mark.parametrize("index_dtype", [torch.float32, torch.int8], ids=["f32", "int8"])
@pytest.mark.parametrize(
    ("kernel", "field"),
    [
        *(("qkv_store", f) for f in ("queries", "keys 0", "values 1", "index_keys")),
        ("qkv_store", "index_queries"),
        ("add_norm", "sum"),
        ("add_norm", "out"),
        ("silu_mul", "out"),
        ("route_experts", "weights"),
        ("route_experts", "experts"),
        ("expert_products", "out"),
    ],
)
def test_a_wrong_number_of_a_layer_is_found(
    library: KernelLibrary,
    kernel: str,
    field: str,
    index_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_kernel(monkeypatch, library, kernel, field)
    kind = replace(LAYERS, attention=replace(DECODE, index_dtype=index_dtype))
    with pytest.raises(TrialError, match=f"^{kernel} gives wrong results"):
        try_layers(library, kind, CPU)


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "field"),
    [
        *(("place_rows", f) for f in ("tables 0", "row_tables 1", "token_slots 1", "top_p")),
        ("place_rows", "token_ids"),
        ("pick_tokens", "out"),
        ("pick_tokens", "newest"),
    ],
)
def test_a_wrong_number_of_a_steps_ends_is_found(
    library: KernelLibrary, kernel: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernel(monkeypatch, library, kernel, field)
    with pytest.raises(TrialError, match=f"^{kernel} gives wrong results"):
        try_step(library, torch.float32, 16, 501, 64, CPU)


def test_the_layer_has_rows_of_every_kind() -> None:
    layer = TrialLayer.make(replace(DECODE, window=8192, block_tokens=64))
    assert layer.lens_R.tolist() == [1, 65, 192, 300 * 64 - 3, 0]
    assert layer.full.k_cache[0].isnan().all(), "the null page"
    assert layer.full.k_cache[2, :, 1:].isnan().all(), "past the end of 65 tokens"
    assert layer.full.k_cache[3].isfinite().all()
    assert layer.window.tables_RB[3, 1] == 0, "a page that slid out"
    roles = {(role.pool, role.retrieval) for role in layer.roles}
    assert roles == {("full", True), ("full", False), ("window", False)}


def test_differences_are_judged_by_number() -> None:
    want = torch.tensor([1.0, torch.nan, -torch.inf, 0.0])
    check_close("k", want, want)
    check_close("k", want + torch.tensor([1e-5, 0, 0, 1e-6]), want)
    for got in ([1.1, 0, 0, 0], [1, 0, 0, 0], [1, torch.nan, 0, 0], [torch.nan] * 4):
        with pytest.raises(TrialError, match="k gives wrong results"):
            check_close("k", torch.tensor(got), want)
    exact, twin = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.015625]).bfloat16()
    check_close("k", torch.tensor([1.03125, 2.0]).bfloat16(), exact, twin)
    with pytest.raises(TrialError, match=r"off by 0\.125 where 0\.0313 is allowed \(1 of 2 numb"):
        check_close("k", torch.tensor([1.125, 2.0]).bfloat16(), exact, twin)
    with pytest.raises(TrialError):
        check_equal("k", torch.tensor([2**40 + 1]), torch.tensor([2**40]))


@pytest.mark.parametrize("raised", [torch.AcceleratorError, KernelError])
def test_a_broken_device_is_told_from_a_kernel_that_was_refused(
    raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous error shows itself at a later call, perhaps at the next launch only."""

    def wait(_: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: illegal address\nmore")

    with pytest.raises(KernelError, match=r"^refused$"), on_trial(CPU):
        raise KernelError("refused")
    monkeypatch.setattr(trial, "_wait", wait)
    with pytest.raises(DeviceFaultError, match=r"\(CUDA error: illegal address\).*cannot go on"):
        _fail(raised)
    with pytest.raises(DeviceFaultError), on_trial(CPU):
        pass


def _fail(raised: type[Exception]) -> None:
    with on_trial(CPU):
        raise raised("CUDA error: illegal address")
