"""A mixture of experts for few tokens, on CUDA kernels (`csrc/experts.cu`).

Shapes do not depend on which experts are chosen and the host learns nothing of it, so that steps
with such layers can be recorded in CUDA graphs. `kernels.layer_reference` says what is computed.

Shapes: T tokens, k experts of each, X experts, E hidden size, F intermediate size, J = T k pairs.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kernels._args import DATA_TYPES
from kernels._checks import check_layout, check_shapes
from kernels._launch import KernelLibrary

MAX_EXPERTS = 256
MAX_CHOSEN = 32
MAX_PAIRS = 2048


class RouteArgs(ctypes.Structure):
    """Arguments of `route_experts`; what each means stands in `csrc/layer_args.h`."""

    _fields_ = [
        ("logits", c_void_p),
        ("weights", c_void_p),
        ("experts", c_void_p),
        ("tokens", c_int64),
        ("expert_count", c_int64),
        ("chosen", c_int64),
        ("normalise", c_int64),
        ("data_type", c_int64),
    ]


class ExpertArgs(ctypes.Structure):
    """Arguments of `expert_products`."""

    _fields_ = [
        ("input", c_void_p),
        ("experts", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("pairs", c_int64),
        ("share", c_int64),
        ("expert_count", c_int64),
        ("outputs", c_int64),
        ("size", c_int64),
        ("gated", c_int64),
        ("data_type", c_int64),
    ]


def takes_experts(tokens: int, expert_count: int, chosen: int) -> bool:
    """Whether the kernels take such a batch."""
    fits = expert_count <= MAX_EXPERTS and chosen <= min(expert_count, MAX_CHOSEN)
    return fits and tokens * chosen <= MAX_PAIRS


def route_experts(
    library: KernelLibrary, logits_TX: Tensor, chosen: int, normalise: bool
) -> tuple[Tensor, Tensor]:
    """`kernels.layer_reference.route_experts`: weights and int32 experts, both [T, k].

    Raises:
        ValueError: shapes, dtypes or layouts that the kernel does not take.
        KernelError: the launch failed.
    """
    check_shapes({}, logits=(logits_TX, "T X"))
    check_layout(logits_TX.dtype, logits=logits_TX)
    tokens, expert_count = logits_TX.shape
    if not takes_experts(0, expert_count, chosen):
        raise ValueError(f"no kernel that chooses {chosen} of {expert_count} experts")
    weights_Tk = logits_TX.new_empty((tokens, chosen))
    experts_Tk = logits_TX.new_empty((tokens, chosen), dtype=torch.int32)
    args = RouteArgs(
        logits=logits_TX.data_ptr(),
        weights=weights_Tk.data_ptr(),
        experts=experts_Tk.data_ptr(),
        tokens=tokens,
        expert_count=expert_count,
        chosen=chosen,
        normalise=normalise,
        data_type=DATA_TYPES[logits_TX.dtype],
    )
    if tokens:
        library.launch("route_experts", args, logits_TX)
    return weights_Tk, experts_Tk


def gate_experts(
    library: KernelLibrary, x_TE: Tensor, experts_Tk: Tensor, gate_up_XGE: Tensor
) -> Tensor:
    """`kernels.layer_reference.gate_experts`: [J, F]. Raises as `route_experts`."""
    sizes: dict[str, int] = {}
    check_shapes(
        sizes, x=(x_TE, "T E"), experts=(experts_Tk, "T k"), gate_up=(gate_up_XGE, "X G E")
    )
    return _products(library, x_TE, experts_Tk, gate_up_XGE, sizes["G"] // 2, gated=True)


def project_experts(
    library: KernelLibrary, inner_JF: Tensor, experts_Tk: Tensor, down_XEF: Tensor
) -> Tensor:
    """`kernels.layer_reference.project_experts`: [J, E]. Raises as `route_experts`."""
    sizes = {"J": experts_Tk.numel()}
    check_shapes(sizes, inner=(inner_JF, "J F"), down=(down_XEF, "X E F"))
    return _products(library, inner_JF, experts_Tk, down_XEF, sizes["E"], gated=False)


def _products(
    library: KernelLibrary,
    rows: Tensor,
    experts_Tk: Tensor,
    weights: Tensor,
    outputs: int,
    *,
    gated: bool,
) -> Tensor:
    """Of each pair's row (a token's, or the pair's own) with its expert's weights."""
    check_layout(rows.dtype, rows=rows, weights=weights)
    check_layout(torch.int32, experts=experts_Tk)
    (tokens, chosen), size = experts_Tk.shape, rows.shape[1]
    if size * rows.element_size() % 16 or outputs % 4:
        raise ValueError(f"no kernel for {outputs} products of {size} in {rows.dtype}")
    if not takes_experts(tokens, len(weights), chosen):
        raise ValueError(f"no kernel for {tokens} tokens with {chosen} of {len(weights)} experts")
    out = rows.new_empty((tokens * chosen, outputs))
    args = ExpertArgs(
        input=rows.data_ptr(),
        experts=experts_Tk.data_ptr(),
        weights=weights.data_ptr(),
        out=out.data_ptr(),
        pairs=tokens * chosen,
        share=chosen if gated else 1,
        expert_count=len(weights),
        outputs=outputs,
        size=size,
        gated=gated,
        data_type=DATA_TYPES[rows.dtype],
    )
    if tokens:
        library.launch("expert_products", args, rows)
    return out
