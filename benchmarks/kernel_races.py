"""Every CUDA kernel on small ugly inputs, with next to nothing around it: what checkers run on.

    compute-sanitizer --tool racecheck python -m benchmarks.kernel_races [--out FILE] [--only NAME]

A checker slows each kernel of a process down some tens of times, those of PyTorch and cuBLAS too.
So inputs are made and twins computed on the CPU, and what the kernels leave is held to the twins
there. Every kernel that the library has is launched: of each type and size of keys, for many rows
and for one, by pair and by expert. Left out are Triton's, which are compiled elsewhere and
synchronise by their compiler. The last line is JSON: seconds of each case, and what is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import describe_hardware
from kernels import decode, indexer
from kernels._build import default_cache, find_library
from kernels._launch import KernelError, KernelLibrary
from kernels.cuda_ops import CudaOps
from kernels.decode_trial import try_decode
from kernels.layer_trial import LayerKind, try_layers
from kernels.span_trial import try_spans
from kernels.step_trial import try_step
from kernels.trial import check_close, check_equal, random_numbers
from kernels.trial_layer import DecodeKind

CPU = torch.device("cpu")
Case = Callable[..., None]  # takes `library` and `device`, raises KernelError
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def _decode_kind(
    dtype: torch.dtype, index_dtype: torch.dtype, index_dim: int | None, head_dim: int, group: int
) -> DecodeKind:
    """Small pages: the longest of the five rows has 300 of them, and 4,797 tokens."""
    return DecodeKind(
        dtype=dtype,
        head_dim=head_dim,
        group=group,
        block_tokens=32 if index_dim == 32 and index_dtype == torch.int8 else 16,
        has_local=True,
        window=100,
        sinks=4,
        index_dim=index_dim,
        index_dtype=index_dtype,
        has_age_bias=index_dim == 16,
    )


def decode_kinds() -> dict[str, DecodeKind]:
    """Of every index, and every kernel of attention: head_dim, dtype, up to 8 heads or 16."""
    bf16, f32, int8 = torch.bfloat16, torch.float32, torch.int8
    return {
        "f32, index of 8": _decode_kind(f32, f32, 8, 64, 2),
        "f32, index of 16": _decode_kind(f32, f32, 16, 128, 2),
        "f32, index of 32": _decode_kind(f32, f32, 32, 64, 1),
        "bf16, index of 8": _decode_kind(bf16, bf16, 8, 64, 2),
        "bf16, index of 16": _decode_kind(bf16, bf16, 16, 128, 4),
        "bf16, index of 32": _decode_kind(bf16, bf16, 32, 128, 1),
        "bf16, index of 8 in int8": _decode_kind(bf16, int8, 8, 64, 2),
        "bf16, index of 16 in int8": _decode_kind(bf16, int8, 16, 128, 2),
        "bf16, index of 32 in int8": _decode_kind(bf16, int8, 32, 128, 1),
        "f32, index of 16 in int8": _decode_kind(f32, int8, 16, 64, 2),
        "bf16, groups of 20, index of 16": _decode_kind(bf16, bf16, 16, 128, 20),
        "bf16, groups of 20, no index": _decode_kind(bf16, bf16, None, 64, 20),
    }


def layer_kinds() -> dict[str, LayerKind]:
    """Of each dtype and head_dim; int8 index keys in half of them."""
    shape = {"is_normed": True, "hidden_size": 264, "inner_sizes": (96, 48)}
    experts = {"experts": 12, "chosen": 3, "normalise": True}
    return {
        f"{name}, head_dim {dim}": LayerKind(
            attention=_decode_kind(dtype, torch.int8 if dim == 128 else dtype, 16, dim, 2),
            **shape,  # type: ignore[arg-type]  # as named
            **experts,  # type: ignore[arg-type]
        )
        for name, dtype in DTYPES.items()
        for dim in (64, 128)
    }


def try_masks(library: KernelLibrary, dtype: torch.dtype, device: torch.device) -> None:
    """Selection from masses that are there, and attention to a mask.

    Raises:
        TrialError: a kernel gives something else than its twin.
    """
    random, ops, block, dim = random_numbers(dtype, seed=11), CudaOps(library), 16, 64
    lens_R = torch.tensor([1, 400, 33 * block])
    mass_RHB = 3 * random_numbers(torch.float32, seed=12)(3, 2, 34)
    top_p_RH = torch.tensor([[0.1, 0.9]] * 3)
    want_RHB = indexer.select_blocks(mass_RHB, top_p_RH, lens_R, block)
    there = (mass_RHB.to(device), top_p_RH.to(device), lens_R.to(device))
    check_equal("select", ops.select_blocks(*there, block), want_RHB)
    tables_RB = torch.randint(0, 9, (3, 34), generator=torch.Generator().manual_seed(13))
    queries = (random(3, 2, dim), torch.tensor([1, 0]))
    pages = (random(9, 2, block, dim), random(9, 2, block, dim), tables_RB, lens_R)
    given = (*queries, *pages, want_RHB)
    found = _attend(ops.decode_sparse, *(part.to(device) for part in given))
    wide = (part.float() if part.is_floating_point() else part for part in given)
    exact, twin = _attend(decode.decode_sparse, *wide), _attend(decode.decode_sparse, *given)
    check_close("sparse_decode", found, exact, twin, rtol=1e-4, atol=2e-6)


def _attend(decode_sparse: Callable[..., Tensor], q_RHD: Tensor, *pages: Tensor) -> Tensor:
    return decode_sparse(q_RHD, *pages, q_RHD.shape[2] ** -0.5)


def cases() -> dict[str, Case]:
    """All of them, by name."""
    found: dict[str, Case] = {}
    for name, kind in decode_kinds().items():
        found[f"decode, {name}"] = partial(try_decode, kind=kind, twins=CPU)
    for name, layers in layer_kinds().items():
        found[f"layers, {name}"] = partial(try_layers, kind=layers)
    for name, dtype in DTYPES.items():
        step = partial(try_step, block_tokens=16, vocab_size=5001, hidden_size=256)
        found[f"ends of a step, {name}"] = partial(step, dtype=dtype)
        found[f"masks, {name}"] = partial(try_masks, dtype=dtype)
    for dim in (64, 128):
        found[f"prefill, head_dim {dim}"] = partial(try_spans, head_dim=dim)
    return found


def run(library: KernelLibrary, device: torch.device, given: dict[str, Case]) -> dict[str, Any]:
    """Every case, also after one that fails; the seconds of each, and what the others say."""
    seconds, failed = {}, {}
    for name, case in given.items():
        start = time.monotonic()
        try:
            case(library=library, device=device)
        except KernelError as error:
            failed[name] = str(error)
        seconds[name] = round(time.monotonic() - start, 2)
        print(f"{name}: {failed.get(name, 'as its twin')}, {seconds[name]} s", flush=True)
    return {"cases": seconds, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    given = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if given.only in name}
    if torch.cuda.get_device_capability() != (9, 0):  # elsewhere that kernel is empty
        chosen = {name: case for name, case in chosen.items() if "prefill" not in name}
    library = KernelLibrary(find_library(default_cache()))
    found = run(library, torch.device("cuda", torch.cuda.current_device()), chosen)
    result = {"benchmark": "kernel_races", "hardware": describe_hardware(), **found}
    if given.out is not None:
        given.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
