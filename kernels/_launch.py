"""The compiled kernels as Python callables: structs as in `_args`, errors as exceptions.

A launcher takes one struct and a stream, starts a kernel there and returns at once. Nothing here
looks at shapes: the doors in `cuda_decode` and `cuda_ops` do.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels._args import (
    DATA_TYPES,
    ENTRY_WORDS,
    GROUP_WORDS,
    KEY_TYPES,
    DecodeArgs,
    DecodePlan,
    SelectArgs,
    SelectPlan,
)

StepKernel = Literal[
    "qkv_store",
    "add_norm",
    "silu_mul",
    "route_experts",
    "expert_products",
    "place_rows",
    "pick_tokens",
]


class KernelError(Exception):
    """A kernel could not be launched; the message is one line."""


class KernelLibrary:
    """The launchers of one compiled library."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            KernelError: not a library of these kernels, or one of other sources.
        """
        try:
            self._library = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path.name}: {error}") from None
        structs = ctypes.sizeof(SelectArgs), ctypes.sizeof(DecodeArgs)
        words = 4 * GROUP_WORDS, 4 * ENTRY_WORDS
        sizes = (*structs, *words, ctypes.sizeof(SelectPlan))
        for which, size in enumerate(sizes):
            if self._library.rtpurbo_struct_bytes(which) != size:
                raise KernelError(f"{path.name}: built from other sources; build the kernels again")
        self._plans: dict[tuple[int, torch.dtype, int, bool], DecodePlan] = {}
        self._select_plans: dict[tuple[int, torch.dtype, int], SelectPlan] = {}

    def launch_select(
        self, which: Literal["index_select", "select", "list"], args: SelectArgs, like: Tensor
    ) -> None:
        """Start a selection kernel on the current stream of the device of `like`."""
        launcher = getattr(self._library, f"rtpurbo_{which}")
        with on_device(like.device):
            self._check(launcher(byref(args), stream_of(like.device)), which)

    def launch_decode(self, args: DecodeArgs, like: Tensor) -> None:
        """Start `sparse_decode` on the current stream of the device of `like`."""
        launcher = self._library.rtpurbo_sparse_decode
        with on_device(like.device):
            self._check(launcher(byref(args), stream_of(like.device)), "sparse_decode")

    def launch(self, name: StepKernel, args: ctypes.Structure, like: Tensor) -> None:
        """Start a kernel beside attention on the current stream of the device of `like`."""
        if getattr(self._library, f"rtpurbo_{name}_bytes")() != ctypes.sizeof(args):
            raise KernelError(f"{name}: built from other sources; build the kernels again")
        launcher = getattr(self._library, f"rtpurbo_{name}")
        with on_device(like.device):
            self._check(launcher(byref(args), c_void_p(stream_of(like.device))), name)

    def launch_prefill(self, args: ctypes.Structure, like: Tensor) -> None:
        """Start `span_prefill` (arguments: `cuda_prefill.SpanArgs`) on the current stream."""
        if self._library.rtpurbo_span_args_bytes() != ctypes.sizeof(args):
            raise KernelError("span_prefill: built from other sources; build the kernels again")
        with on_device(like.device):
            code = self._library.rtpurbo_span_prefill(byref(args), stream_of(like.device))
        self._check(code, "span_prefill")

    def decode_plan(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, *, wide: bool = False
    ) -> DecodePlan:
        """CTAs, warps and shared memory of a decode launch; asked of the device once.

        `wide`: a tile holds more than 8 query heads.

        Raises:
            KernelError: no kernel for this dtype and head_dim, or the device refuses it.
        """
        key = (device.index or 0, dtype, head_dim, wide)
        if key not in self._plans:
            plan = DecodePlan()
            with on_device(device):
                code = self._library.rtpurbo_decode_plan(
                    DATA_TYPES.get(dtype, -1), head_dim, 16 if wide else 8, byref(plan)
                )
            self._check(code, f"attention in {dtype} with head_dim {head_dim}")
            self._plans[key] = plan
        return self._plans[key]

    def select_plan(
        self, device: torch.device, key_dtype: torch.dtype, index_dim: int
    ) -> SelectPlan:
        """CTAs and shared memory of an indexer launch; asked of the device once.

        Args:
            key_dtype: of the index keys.

        Raises:
            KernelError: no kernel for these keys, or the device refuses it.
        """
        key = (device.index or 0, key_dtype, index_dim)
        if key not in self._select_plans:
            args = SelectArgs(key_type=KEY_TYPES.get(key_dtype, -1), index_dim=index_dim)
            plan = SelectPlan()
            with on_device(device):
                code = self._library.rtpurbo_select_plan(byref(args), byref(plan))
            self._check(code, f"an index in {key_dtype} with index_dim {index_dim}")
            self._select_plans[key] = plan
        return self._select_plans[key]

    @property
    def host(self) -> ctypes.CDLL:
        """The kernels' arithmetic on the host, `rtpurbo_mass_bin` and so on, for tests."""
        return self._library

    def _check(self, code: int, what: str) -> None:
        if code != 0:
            name = self._library.rtpurbo_error_name(code).decode()
            raise KernelError(f"{what}: {name} (CUDA error {code})")

    def _declare(self) -> None:
        lib = self._library
        for which in ("index_select", "select", "list"):
            getattr(lib, f"rtpurbo_{which}").argtypes = [POINTER(SelectArgs), c_void_p]
        lib.rtpurbo_sparse_decode.argtypes = [POINTER(DecodeArgs), c_void_p]
        lib.rtpurbo_decode_plan.argtypes = [c_int64, c_int64, c_int64, POINTER(DecodePlan)]
        lib.rtpurbo_select_plan.argtypes = [POINTER(SelectArgs), POINTER(SelectPlan)]
        lib.rtpurbo_span_prefill.argtypes = [c_void_p, c_void_p]
        lib.rtpurbo_span_args_bytes.restype = c_int64
        lib.rtpurbo_struct_bytes.argtypes = [c_int]
        lib.rtpurbo_struct_bytes.restype = c_int64
        lib.rtpurbo_error_name.argtypes = [c_int]
        lib.rtpurbo_error_name.restype = c_char_p
        lib.rtpurbo_mass_bin.argtypes = [c_float]
        lib.rtpurbo_fixed_mass.argtypes = [c_float]
        lib.rtpurbo_fixed_mass.restype = c_uint64
        lib.rtpurbo_share_start.argtypes = [c_int64] * 3
        lib.rtpurbo_share_start.restype = c_int64
        lib.rtpurbo_piece_blocks.argtypes = [c_int] * 4
        lib.rtpurbo_piece_start.argtypes = [c_int] * 3
        lib.rtpurbo_divide.argtypes = [c_int] * 2
        lib.rtpurbo_shares_start.argtypes = [c_int] * 3
        lib.rtpurbo_shares_owner.argtypes = [c_int] * 3
        lib.rtpurbo_working_ctas.argtypes = [c_int64] * 3
        lib.rtpurbo_working_ctas.restype = c_int64
        lib.rtpurbo_item_of.argtypes = [POINTER(c_int), c_int, c_int64]
        lib.rtpurbo_window_blocks.argtypes = [c_int64] * 4 + [POINTER(c_int)]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, if it is not: launches go to the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """Handle of the current stream; 0 on the CPU, where tests run an emulation of the kernels."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
