"""The ends of a decode step on CUDA kernels (`csrc/step.cu`): the ops of `kernels.step_ops`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kernels._args import DATA_TYPES, pointer
from kernels._checks import check_layout, check_shapes
from kernels._launch import KernelLibrary
from kernels.step_ops import INPUT_ROWS, PlacedRows


class PlaceArgs(ctypes.Structure):
    """Arguments of `place_rows`; what each means stands in `csrc/step_args.h`."""

    _fields_ = [
        ("inputs", c_void_p),
        ("input_stride", c_int64),
        ("rows", c_int64),
        ("newest", c_void_p),
        ("token_ids", c_void_p),
        ("tables", c_void_p * 2),
        ("row_tables", c_void_p * 2),
        ("width", c_int64),
        ("token_slots", c_void_p * 2),
        ("top_p", c_void_p),
        ("block_tokens", c_int64),
    ]


class PickArgs(ctypes.Structure):
    """Arguments of `pick_tokens`."""

    _fields_ = [
        ("logits", c_void_p),
        ("hidden", c_void_p),
        ("counts", c_void_p),
        ("inputs", c_void_p),
        ("input_stride", c_int64),
        ("newest", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("vocabulary", c_int64),
        ("hidden_size", c_int64),
        ("heads", c_int64),
        ("data_type", c_int64),
    ]


def place_rows(
    library: KernelLibrary,
    inputs_8R: Tensor,
    newest_S: Tensor,
    full_SB: Tensor,
    window_SB: Tensor,
    block_tokens: int,
) -> PlacedRows:
    """`kernels.step_ops.place_rows` in one launch.

    Raises:
        ValueError: shapes, dtypes or layouts that the kernel does not take.
        KernelError: the launch failed.
    """
    sizes = {"8": INPUT_ROWS}
    check_shapes(sizes, full=(full_SB, "S B"), window=(window_SB, "S B"))
    check_layout(torch.int64, full=full_SB, window=window_SB)
    _check_inputs(sizes, inputs_8R, newest_S)
    rows, width = sizes["R"], sizes["B"]
    token_ids_R = inputs_8R.new_empty(rows)
    slots = (inputs_8R.new_empty(rows), inputs_8R.new_empty(rows))
    tables = (inputs_8R.new_empty((rows, width)), inputs_8R.new_empty((rows, width)))
    top_p_R = inputs_8R.new_empty(rows, dtype=torch.float32)
    args = PlaceArgs(
        inputs=inputs_8R.data_ptr(),
        input_stride=inputs_8R.stride(0),
        rows=rows,
        newest=newest_S.data_ptr(),
        token_ids=token_ids_R.data_ptr(),
        width=width,
        top_p=top_p_R.data_ptr(),
        block_tokens=block_tokens,
    )
    for pool, table_SB in enumerate((full_SB, window_SB)):
        args.tables[pool] = table_SB.data_ptr()
        args.row_tables[pool] = tables[pool].data_ptr()
        args.token_slots[pool] = slots[pool].data_ptr()
    if rows:
        library.launch("place_rows", args, inputs_8R)
    return PlacedRows(token_ids_R, slots, tables, top_p_R)


def pick_tokens(
    library: KernelLibrary,
    logits_RV: Tensor,
    hidden_RE: Tensor,
    counts_RH: Tensor | None,
    inputs_8R: Tensor,
    newest_S: Tensor,
) -> Tensor:
    """`kernels.step_ops.pick_tokens` in one launch. Raises as `place_rows`."""
    sizes = {"8": INPUT_ROWS}
    check_shapes(sizes, logits=(logits_RV, "R V"), hidden=(hidden_RE, "R E"))
    check_layout(logits_RV.dtype, logits=logits_RV, hidden=hidden_RE)
    _check_inputs(sizes, inputs_8R, newest_S)
    rows, heads = sizes["R"], 0
    if counts_RH is not None:
        check_shapes(sizes, counts=(counts_RH, "R H"))
        check_layout(torch.int64, counts=counts_RH)
        heads = sizes["H"]
    count = 2 * rows if counts_RH is None else 5 * rows + 2 * heads
    out = logits_RV.new_empty(count, dtype=torch.float64)
    args = PickArgs(
        logits=logits_RV.data_ptr(),
        hidden=hidden_RE.data_ptr(),
        counts=pointer(counts_RH),
        inputs=inputs_8R.data_ptr(),
        input_stride=inputs_8R.stride(0),
        newest=newest_S.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        vocabulary=sizes["V"],
        hidden_size=sizes["E"],
        heads=heads,
        data_type=DATA_TYPES[logits_RV.dtype],
    )
    if rows:
        library.launch("pick_tokens", args, logits_RV)
    return out


def _check_inputs(sizes: dict[str, int], inputs_8R: Tensor, newest_S: Tensor) -> None:
    """Raises ValueError for what neither kernel takes."""
    check_shapes(sizes, inputs=(inputs_8R, "8 R"), newest=(newest_S, "S"))
    check_layout(torch.int64, newest=newest_S)
    if inputs_8R.dtype != torch.int64 or inputs_8R.stride(1) != 1:
        raise ValueError("inputs must be torch.int64 in whole rows")
