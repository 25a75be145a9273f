"""What runs under CUDA's checkers: every kernel is in it, and a wrong number is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu_steps import reported
from benchmarks.kernel_races import cases, run
from kernels._args import DATA_TYPES, KEY_TYPES
from kernels._launch import KernelLibrary
from tests.kernels.emulation.library import compiler
from tests.kernels.trial_case import break_kernel

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")
BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8


@needs_compiler
def test_every_kernel_is_run_and_gives_what_its_twin_gives(
    emulated_kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.trial_layer.LONG", 40)  # blocks: here CTAs are not side by side
    launched: set[tuple[Any, ...]] = set()
    library = emulated_kernels
    select, decode = library.launch_select, library.launch_decode
    launch, prefill = library.launch, library.launch_prefill

    def selected(which: Any, args: Any, like: Any) -> None:
        select(which, args, like)
        is_choice = which == "index_select" and args.words is not None
        by = "clusters" if is_choice and args.cluster and args.rows == 1 else "shares"
        keys = (by, args.key_type, args.index_dim) if which == "index_select" else ()
        launched.add((which, *keys))

    def decoded(args: Any, like: Any) -> None:
        decode(args, like)
        by = "clusters" if args.cluster else "shares"
        launched.add(("sparse_decode", by, like.dtype, args.head_dim, args.tile_heads > 8))
        launched.add(("sparse_decode", "lists" if args.lists else "no lists"))

    def other(name: Any, args: Any, like: Any) -> None:
        launch(name, args, like)
        launched.add((name, like.dtype))

    def attended(args: Any, like: Any) -> None:
        prefill(args, like)
        rule = "lists" if args.lists else "all" if args.window == 2**30 else "window"
        launched.add(("span_prefill", args.head_dim, rule))

    for name, watched in (
        ("launch_select", selected),
        ("launch_decode", decoded),
        ("launch", other),
        ("launch_prefill", attended),
    ):
        monkeypatch.setattr(library, name, watched)
    found = run(library, CPU, cases())
    assert found["failed"] == {}
    wanted: set[tuple[Any, ...]] = {("select",), ("list",)}
    keys = {KEY_TYPES[dtype] for dtype in (BF16, F32, INT8)}
    for by in ("shares", "clusters"):
        wanted |= {("index_select", by, key, dim) for key in keys for dim in (8, 16, 32)}
        for dim in (64, 128):
            wanted |= {("sparse_decode", by, BF16, dim, wide) for wide in (False, True)}
            wanted.add(("sparse_decode", by, F32, dim, False))
    wanted |= {("sparse_decode", "lists"), ("sparse_decode", "no lists")}
    wanted |= {("span_prefill", d, rule) for d in (64, 128) for rule in ("window", "all", "lists")}
    step = ("qkv_store", "add_norm", "silu_mul", "route_experts", "expert_products", "pick_tokens")
    wanted |= {(name, dtype) for name in step for dtype in DATA_TYPES}
    assert wanted - launched == set()
    assert "place_rows" in {name for name, *_ in launched}


@needs_compiler
def test_a_kernel_that_gives_something_else_is_told_and_the_others_go_on(
    emulated_kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernel(monkeypatch, emulated_kernels, "select", "mask")
    chosen = {
        name: case for name, case in cases().items() if name.endswith(("step, f32", "s, f32"))
    }
    found = run(emulated_kernels, CPU, chosen)
    assert list(found["cases"]) == ["ends of a step, f32", "masks, f32"]
    assert list(found["failed"]) == ["masks, f32"]
    assert found["failed"]["masks, f32"].startswith("select gives wrong results")


KERNEL = (
    "void rtpurbo::(anonymous namespace)::index_cluster_kernel<rtpurbo::Bfloat16Keys<(int)16> >"
    "(rtpurbo::SelectArgs)"
)
REPORT = f"""========= COMPUTE-SANITIZER
decode, f32: as its twin, 1.0 s
========= Error: Race reported between Write access at {KERNEL}+0x2b10 in index_cluster.cu:181
=========     and Write access at {KERNEL}+0xc80 in index_ring.cuh:70 [512 hazards]
=========
========= Error: Race reported between Read access at nvjet_sm90_tst_64x8_64x16_1x4_h_bz_TNT+0x1d70
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


def test_kernels_that_a_checker_names_are_listed() -> None:
    names = ["nvjet_sm90_tst_64x8_64x16_1x4_h_bz_TNT", "rtpurbo::index_cluster_kernel"]
    assert reported(REPORT) == names
    assert reported("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == []
