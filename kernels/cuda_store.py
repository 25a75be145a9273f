"""From a layer's projection to where attention reads, on a CUDA kernel (`csrc/qkv_store.cu`).

One launch that waits for nothing and can be recorded in a CUDA graph; results do not depend on what
else is in the batch. `kernels.layer_reference` says what it computes.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kernels._args import DATA_TYPES, pointer
from kernels._checks import check_layout, check_shapes
from kernels._launch import KernelLibrary
from kernels.layer_inputs import HeadNorm, IndexProjections, StoredPool, StoredQkv

HEAD_DIMS = (64, 128)
OUTPUTS_AT_ONCE = 8  # index_dim is a multiple of it


class StoreArgs(ctypes.Structure):
    """Arguments of `qkv_store`; what each means stands in `csrc/layer_args.h`."""

    _fields_ = [
        ("projected", c_void_p),
        ("norm", c_void_p),
        ("eps", c_double),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("kv_rows", c_void_p),
        ("queries", c_void_p),
        ("keys", c_void_p * 2),
        ("values", c_void_p * 2),
        ("cache_rows", c_int64 * 2),
        ("slots", c_void_p * 2),
        ("block_tokens", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("data_type", c_int64),
        ("key_projection", c_void_p),
        ("key_head", c_void_p),
        ("index_rows", c_int64),
        ("index_keys", c_void_p),
        ("index_scales", c_void_p),
        ("index_keys_in_rows", c_int64),
        ("query_projection", c_void_p),
        ("query_head", c_void_p),
        ("selecting", c_int64),
        ("index_queries", c_void_p),
        ("index_query_tokens", c_int64),
        ("index_dim", c_int64),
    ]


def takes_heads(dtype: torch.dtype, head_dim: int, index_dim: int | None) -> bool:
    """Whether `store_qkv` has a kernel for such a layer; `index_dim` None: without an index."""
    index = index_dim or 0
    fits = index % OUTPUTS_AT_ONCE == 0 and 2 * index <= head_dim
    return dtype in DATA_TYPES and head_dim in HEAD_DIMS and fits


def store_qkv(
    library: KernelLibrary,
    projected_TRD: Tensor,
    heads: int,
    norm: HeadNorm | None,
    cos_TF: Tensor,
    sin_TF: Tensor,
    kv_row_N: Tensor,
    full: StoredPool | None,
    window: StoredPool | None,
    index: IndexProjections | None,
) -> StoredQkv:
    """`kernels.layer_reference.store_qkv`: norm, RoPE, pages and index space in one launch.

    Raises:
        ValueError: shapes, dtypes or layouts that the kernel does not take.
        KernelError: the launch failed.
    """
    sizes = _check_store(projected_TRD, heads, norm, cos_TF, sin_TF, kv_row_N)
    tokens, _, dim = projected_TRD.shape
    q_THD = projected_TRD.new_empty((tokens, heads, dim))
    args = StoreArgs(
        projected=projected_TRD.data_ptr(),
        norm=pointer(None if norm is None else norm.weight_2D),
        eps=0.0 if norm is None else norm.eps,
        cosines=cos_TF.data_ptr(),
        sines=sin_TF.data_ptr(),
        kv_rows=kv_row_N.data_ptr(),
        queries=q_THD.data_ptr(),
        tokens=tokens,
        heads=heads,
        kv_heads=sizes["N"],
        head_dim=dim,
        data_type=DATA_TYPES[projected_TRD.dtype],
    )
    for place, pool in enumerate((full, window)):
        if pool is None:
            continue
        _check_pool(pool, sizes, projected_TRD.dtype)
        args.keys[place], args.values[place] = pool.k_cache.data_ptr(), pool.v_cache.data_ptr()
        args.cache_rows[place] = pool.k_cache.shape[1]
        args.slots[place] = pool.slots_T.data_ptr()
        args.block_tokens = sizes["K"]
    qi_QSI = ki_TXI = None
    if index is not None:
        qi_QSI, ki_TXI = _add_index(args, index, sizes, full, projected_TRD)
    if tokens:
        library.launch("qkv_store", args, projected_TRD)
    return StoredQkv(q_THD, qi_QSI, ki_TXI)


def _check_store(
    projected_TRD: Tensor,
    heads: int,
    norm: HeadNorm | None,
    cos_TF: Tensor,
    sin_TF: Tensor,
    kv_row_N: Tensor,
) -> dict[str, int]:
    sizes = {"R": heads + 2 * len(kv_row_N), "F": projected_TRD.shape[-1] // 2}
    check_shapes(
        sizes,
        kv_row=(kv_row_N, "N"),
        projected=(projected_TRD, "T R D"),
        cos=(cos_TF, "T F"),
        sin=(sin_TF, "T F"),
    )
    dtype, dim = projected_TRD.dtype, projected_TRD.shape[2]
    if not takes_heads(dtype, dim, None):
        raise ValueError(f"no kernel for {dtype} and head_dim {dim}")
    check_layout(dtype, projected=projected_TRD)
    check_layout(torch.float32, cos=cos_TF, sin=sin_TF)
    check_layout(torch.int32, kv_row=kv_row_N)
    if norm is not None:
        check_shapes({"W": 2 * dim}, norm=(norm.weight_2D, "W"))
        check_layout(dtype, norm=norm.weight_2D)
    return sizes


def _check_pool(pool: StoredPool, sizes: dict[str, int], dtype: torch.dtype) -> None:
    own = {name: sizes[name] for name in "TDK" if name in sizes}
    check_shapes(
        own,
        k_cache=(pool.k_cache, "P M K D"),
        v_cache=(pool.v_cache, "P M K D"),
        slots=(pool.slots_T, "T"),
    )
    sizes["K"] = own["K"]
    check_layout(dtype, k_cache=pool.k_cache, v_cache=pool.v_cache)
    check_layout(torch.int64, slots=pool.slots_T)


def _add_index(
    args: StoreArgs,
    index: IndexProjections,
    sizes: dict[str, int],
    full: StoredPool | None,
    projected_TRD: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Index queries to be written, and index keys if they go to no cache."""
    dtype = projected_TRD.dtype
    check_shapes(
        sizes,
        k_proj=(index.k_proj_XID, "X I D"),
        k_head=(index.k_head_X, "X"),
        q_proj=(index.q_proj_SID, "S I D"),
        q_head=(index.q_head_S, "S"),
    )
    check_layout(dtype, k_proj=index.k_proj_XID, q_proj=index.q_proj_SID)
    check_layout(torch.int64, k_head=index.k_head_X, q_head=index.q_head_S)
    if not takes_heads(dtype, sizes["D"], sizes["I"]):
        raise ValueError(f"no kernel for index_dim {sizes['I']} with head_dim {sizes['D']}")
    if not 0 <= index.query_tokens <= sizes["T"]:
        raise ValueError(f"{index.query_tokens} of {sizes['T']} tokens cannot have index queries")
    ki_TXI = None
    if index.index_cache is None:
        ki_TXI = projected_TRD.new_empty((sizes["T"], sizes["X"], sizes["I"]))
    elif full is None:
        raise ValueError("index keys need the full pool, whose pages they share")
    else:
        of_pool = {**sizes, "P": len(full.k_cache)}
        check_shapes(of_pool, index_cache=(index.index_cache, "P X K I"))
        if index.index_scales is not None:
            check_shapes(of_pool, index_scales=(index.index_scales, "P X K"))
            check_layout(torch.bfloat16, index_scales=index.index_scales)
        key_dtype = dtype if index.index_scales is None else torch.int8
        check_layout(key_dtype, index_cache=index.index_cache)
    qi_QSI = projected_TRD.new_empty((index.query_tokens, sizes["S"], sizes["I"]))
    args.key_projection, args.key_head = index.k_proj_XID.data_ptr(), index.k_head_X.data_ptr()
    args.index_rows, args.index_dim = sizes["X"], sizes["I"]
    args.index_keys = pointer(index.index_cache if ki_TXI is None else ki_TXI)
    args.index_keys_in_rows = ki_TXI is not None
    args.index_scales = pointer(index.index_scales if ki_TXI is None else None)
    args.query_projection, args.query_head = index.q_proj_SID.data_ptr(), index.q_head_S.data_ptr()
    args.selecting = sizes["S"] if index.query_tokens else 0
    args.index_queries, args.index_query_tokens = qi_QSI.data_ptr(), index.query_tokens
    return qi_QSI, ki_TXI
