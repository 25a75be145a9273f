"""What a layer does between its products, on CUDA kernels (`csrc/layer_ops.cu`).

Each op is one launch that waits for nothing and can be recorded in a CUDA graph; results do not
depend on what else is in the batch. `kernels.layer_reference` says what they compute.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kernels._args import DATA_TYPES, pointer
from kernels._checks import check_layout, check_shapes
from kernels._launch import KernelLibrary

NORM_BYTES = 4 * 1024 * 16  # of a row that `add_norm` takes, at most


class NormArgs(ctypes.Structure):
    """Arguments of `add_norm`; what each means stands in `csrc/layer_args.h`."""

    _fields_ = [
        ("input", c_void_p),
        ("branch", c_void_p),
        ("sum", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("eps", c_double),
        ("tokens", c_int64),
        ("size", c_int64),
        ("data_type", c_int64),
    ]


class GatedArgs(ctypes.Structure):
    """Arguments of `silu_mul`."""

    _fields_ = [
        ("gate_up", c_void_p),
        ("out", c_void_p),
        ("tokens", c_int64),
        ("size", c_int64),
        ("data_type", c_int64),
    ]


def takes_rows(dtype: torch.dtype, size: int) -> bool:
    """Whether `add_norm` and `silu_mul` take rows of `size` elements."""
    in_pieces = size * dtype.itemsize % 16 == 0
    return dtype in DATA_TYPES and in_pieces and size * dtype.itemsize <= NORM_BYTES


def add_norm(
    library: KernelLibrary, x_TE: Tensor, branch_TE: Tensor | None, weight_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`kernels.layer_reference.add_norm`: the sum, and its norm.

    Raises:
        ValueError: shapes, dtypes or layouts that the kernel does not take.
        KernelError: the launch failed.
    """
    sizes: dict[str, int] = {}
    check_shapes(sizes, x=(x_TE, "T E"), weight=(weight_E, "E"))
    check_layout(x_TE.dtype, x=x_TE, weight=weight_E)
    if not takes_rows(x_TE.dtype, sizes["E"]):
        raise ValueError(f"no kernel for rows of {sizes['E']} in {x_TE.dtype}")
    sum_TE, out_TE = x_TE, torch.empty_like(x_TE)
    if branch_TE is not None:
        check_shapes(sizes, branch=(branch_TE, "T E"))
        check_layout(x_TE.dtype, branch=branch_TE)
        sum_TE = torch.empty_like(x_TE)
    args = NormArgs(
        input=x_TE.data_ptr(),
        branch=pointer(branch_TE),
        sum=sum_TE.data_ptr(),
        weight=weight_E.data_ptr(),
        out=out_TE.data_ptr(),
        eps=eps,
        tokens=sizes["T"],
        size=sizes["E"],
        data_type=DATA_TYPES[x_TE.dtype],
    )
    if sizes["T"]:
        library.launch("add_norm", args, x_TE)
    return sum_TE, out_TE


def silu_mul(library: KernelLibrary, gate_up_TF: Tensor) -> Tensor:
    """`kernels.layer_reference.silu_mul`: [T, F] of [T, 2 F]. Raises as `add_norm`."""
    check_shapes({}, gate_up=(gate_up_TF, "T F"))
    check_layout(gate_up_TF.dtype, gate_up=gate_up_TF)
    tokens, double = gate_up_TF.shape
    if double % 2 or double // 2 * gate_up_TF.dtype.itemsize % 16:
        raise ValueError(f"no kernel for rows of {double / 2:g} in {gate_up_TF.dtype}")
    out_TF = gate_up_TF.new_empty((tokens, double // 2))
    args = GatedArgs(
        gate_up=gate_up_TF.data_ptr(),
        out=out_TF.data_ptr(),
        tokens=tokens,
        size=double // 2,
        data_type=DATA_TYPES[gate_up_TF.dtype],
    )
    if tokens:
        library.launch("silu_mul", args, gate_up_TF)
    return out_TF
