"""What attention launchers take: the structs, limits and dtype codes of `csrc/args.h`, mirrored.

A field added there is added here, at the same place; `KernelLibrary` refuses a library of other
sizes. `csrc/args.h` says what each field means, and its shape. A field is an address on the device
(null for a tensor that is left out), an integer or a double, 8 bytes each; strides are in elements.
Structs of other launchers stand beside their doors (`cuda_store`, `cuda_prefill`, ...).
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

TILE_HEADS = 16
MAX_ITEMS = 1024  # rows x group tiles of one launch
FEW_ITEMS = 64  # at most, for clusters
MAX_RANKS = 16  # CTAs of a cluster
SHORT_BLOCKS = 1024  # of a row, up to which its selection is over before its window is read
CHUNK_COLUMNS = 16  # that one of them adds up
MAX_BLOCKS = 65535  # of one sequence
MAX_WINDOW = 2**30
GROUP_WORDS = 4 + 2 * TILE_HEADS  # int32 of a group
ENTRY_WORDS = 2  # int32 of a list entry

DATA_TYPES = {torch.bfloat16: 0, torch.float32: 1}
KEY_TYPES = DATA_TYPES | {torch.int8: 2}


class Table(ctypes.Structure):
    """Block table of a pool: [R, B], rows `row_stride` apart."""

    _fields_ = [("pages", c_void_p), ("row_stride", c_int64), ("is_64_bit", c_int64)]

    @classmethod
    def of(cls, tables_RB: Tensor) -> Table:
        is_64_bit = tables_RB.dtype == torch.int64
        return cls(tables_RB.data_ptr(), tables_RB.stride(0), is_64_bit)


class SelectArgs(ctypes.Structure):
    """Arguments of `index_select`, `select` and `list`; what each means stands in `csrc/args.h`."""

    _fields_ = [
        ("queries", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("index_cache", c_void_p),
        ("index_scales", c_void_p),
        ("index_row", c_void_p),
        ("age_bias", c_void_p),
        ("index_rows", c_int64),
        ("index_dim", c_int64),
        ("data_type", c_int64),
        ("key_type", c_int64),
        ("table", Table),
        ("context_lens", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("block_tokens", c_int64),
        ("log_mass", c_void_p),
        ("width", c_int64),
        ("top_p", c_void_p),
        ("top_p_row_stride", c_int64),
        ("top_p_head_stride", c_int64),
        ("own_top_p", c_void_p),
        ("dense_below", c_int64),
        ("words", c_void_p),
        ("words_width", c_int64),
        ("mask", c_void_p),
        ("attended", c_void_p),
        ("head_done", c_void_p),
        ("groups", c_void_p),
        ("group_of_head", c_void_p),
        ("group_count", c_int64),
        ("group_done", c_void_p),
        ("lists", c_void_p),
        ("list_counts", c_void_p),
        ("window", c_int64),
        ("sinks", c_int64),
        ("ctas", c_int64),
        ("shared_bytes", c_int64),
        ("most_kept", c_int64),
        ("cluster", c_int64),
        ("overlap", c_int64),
    ]


class SelectPlan(ctypes.Structure):
    """How a launch of `index_select` fills a device."""

    _fields_ = [
        ("ctas", c_int64),
        ("shared_bytes", c_int64),
        ("clusters_of_8", c_int64),
        ("clusters_of_16", c_int64),
    ]

    def cluster(self, heads: int, blocks: int) -> int:
        """CTAs of a cluster for rows of up to so many blocks, if those of all heads run at once;
        else 0. Few blocks take eight no longer, which leave more of the device to attention."""
        sizes = {8: self.clusters_of_8, 16: self.clusters_of_16}
        order = (8, 16) if blocks <= SHORT_BLOCKS else (16, 8)
        return next((size for size in order if heads <= sizes[size]), 0)


class DecodeArgs(ctypes.Structure):
    """Arguments of `sparse_decode`; what each means stands in `csrc/args.h`."""

    _fields_ = [
        ("queries", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("out", c_void_p),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("keys", c_void_p * 2),
        ("values", c_void_p * 2),
        ("kv_rows", c_int64 * 2),
        ("tables", Table * 2),
        ("context_lens", c_void_p),
        ("rows", c_int64),
        ("groups", c_void_p),
        ("group_count", c_int64),
        ("tile_heads", c_int64),
        ("block_tokens", c_int64),
        ("head_dim", c_int64),
        ("data_type", c_int64),
        ("scale", c_double),
        ("window", c_int64),
        ("sinks", c_int64),
        ("lists", c_void_p),
        ("list_counts", c_void_p),
        ("list_width", c_int64),
        ("dense_below", c_int64),
        ("partial", c_void_p),
        ("partial_stats", c_void_p),
        ("item_done", c_void_p),
        ("ctas", c_int64),
        ("warps", c_int64),
        ("shared_bytes", c_int64),
        ("overlap", c_int64),
        ("held_back", c_int64),
        ("cluster", c_int64),
        ("placement", c_int64),
        ("least_blocks", c_int64),
        ("least_listed", c_int64),
        ("by_groups", c_int64),
        ("by_tokens", c_int64),
        ("by_strips", c_int64),
    ]


class DecodePlan(ctypes.Structure):
    """How a decode launch fills a device."""

    _fields_ = [
        ("ctas", c_int64),
        ("warps", c_int64),
        ("shared_bytes", c_int64),
        ("overlap", c_int64),
        ("clusters_of_8", c_int64),
        ("clusters_of_16", c_int64),
    ]

    @property
    def cluster(self) -> int:
        """CTAs of a cluster for few rows; 0 where the device has no clusters."""
        return 16 if self.clusters_of_16 else 8 if self.clusters_of_8 else 0

    def clusters(self, size: int) -> int:
        """How many of 8 or 16 CTAs run at once."""
        found: int = self.clusters_of_16 if size == 16 else self.clusters_of_8
        return found


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element, or null."""
    return None if tensor is None else tensor.data_ptr()
