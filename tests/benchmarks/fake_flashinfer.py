"""FlashInfer's API as the benchmarks call it (0.6.8.post1), in plain PyTorch on any device.

Parameters bear the library's names and order, as far as they are passed; where it is installed,
`test_flashinfer_peer` compares them. What the library would refuse, this refuses, and a plan whose
module was not built before: the library would compile it there, while something is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Module = tuple[str, bool]  # template, and whether it masks a window


@dataclass(frozen=True)
class JitSpec:
    """A module to be compiled, or one that came with the library."""

    module: Module
    prebuilt: frozenset[Module]
    compile: Callable[[Module], object]

    @property
    def is_aot(self) -> bool:
        return self.module in self.prebuilt

    def build(self, verbose: bool, need_lock: bool = True) -> None:
        assert need_lock
        self.compile(self.module)
        sys.modules["flashinfer.jit"].built.add(self.module)


class Paged:
    """What both wrappers share: the plan's pages, and attention over them."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8
        self.plans = 0

    def needs(self, template: str, windowed: bool) -> None:
        assert (template, windowed) in sys.modules["flashinfer.jit"].built

    def keep(self, starts: Tensor, pages: Tensor, last: Tensor, heads: int, kv_heads: int) -> None:
        assert all(value.dtype == torch.int32 for value in (starts, pages, last))
        assert heads % kv_heads == 0
        self.starts, self.pages, self.last = starts.tolist(), pages.long(), last.tolist()
        self.heads, self.kv_heads, self.plans = heads, kv_heads, self.plans + 1

    def row(self, number: int, cache: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Keys and values of a row: [heads, tokens, head_dim]."""
        begin, end = self.starts[number : number + 2]
        block = cache[0].shape[2]
        tokens = (end - begin - 1) * block + self.last[number]
        return [
            part[self.pages[begin:end]]
            .transpose(0, 1)
            .flatten(1, 2)[:, :tokens]
            .repeat_interleave(self.heads // self.kv_heads, 0)
            for part in cache
        ]


class BatchDecodeWithPagedKVCacheWrapper(Paged):
    """Every row has one query."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph
        assert use_tensor_cores
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert all(buffer is not None for buffer in buffers)
        self.sizes = [buffer.shape for buffer in buffers if buffer is not None]

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype = "float16",
    ) -> None:
        self.needs("fa2", window_left >= 0)
        assert [value.shape for value in (indptr, indices, last_page_len)] == self.sizes
        assert q_data_type == torch.bfloat16
        self.keep(indptr, indices, last_page_len, num_qo_heads, num_kv_heads)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        assert out.shape == q.shape
        for number, q_HD in enumerate(q):
            k, v = self.row(number, paged_kv_cache)
            out[number] = scaled_dot_product_attention(q_HD[:, None], k, v)[:, 0]
        return out


class BatchPrefillWithPagedKVCacheWrapper(Paged):
    """Prompts, causal, of the window that the plan names."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert backend == "fa3"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
    ) -> None:
        self.needs("fa3", window_left >= 0)
        assert causal
        assert q_data_type == torch.bfloat16
        self.queries, self.window_left = qo_indptr.tolist(), window_left
        layout = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self.keep(*layout, num_qo_heads, num_kv_heads)

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None
    ) -> Tensor:
        """Its window is inclusive: a token sees those that are at most `window_left` before it."""
        out = torch.zeros_like(q) if out is None else out
        for number, begin in enumerate(self.queries[:-1]):
            rows = slice(begin, self.queries[number + 1])
            k, v = self.row(number, paged_kv_cache)
            age = torch.arange(k.shape[1] - (rows.stop - begin), k.shape[1])[:, None]
            age = age - torch.arange(k.shape[1])
            seen = (age >= 0) & ((age <= self.window_left) | (self.window_left < 0))
            mixed = scaled_dot_product_attention(q[rows].transpose(0, 1), k, v, seen.to(q.device))
            out[rows] = mixed.transpose(0, 1)
        return out


def modules(
    build: Callable[[Module], object],
    prefill: type = BatchPrefillWithPagedKVCacheWrapper,
    prebuilt: frozenset[Module] = frozenset(),
) -> dict[str, ModuleType]:
    """For `sys.modules`; `build` gets every module to be compiled."""

    def gen_batch_prefill_module(
        backend: str,
        dtype_q: torch.dtype,
        dtype_kv: torch.dtype,
        dtype_o: torch.dtype,
        dtype_idx: torch.dtype,
        head_dim_qk: int,
        head_dim_vo: int,
        pos_encoding_mode: int,
        use_sliding_window: bool,
        use_logits_soft_cap: bool,
        use_fp16_qk_reduction: bool,
    ) -> JitSpec:
        assert backend in ("fa2", "fa3")
        assert dtype_idx == torch.int32
        return JitSpec((backend, use_sliding_window), prebuilt, build)

    library, jit = ModuleType("flashinfer"), ModuleType("flashinfer.jit")
    library.__spec__ = ModuleSpec("flashinfer", None)
    decode = BatchDecodeWithPagedKVCacheWrapper
    parts = {"__version__": "0.6.8", "BatchDecodeWithPagedKVCacheWrapper": decode}
    vars(library).update(parts | {"BatchPrefillWithPagedKVCacheWrapper": prefill, "jit": jit})
    vars(jit).update(gen_batch_prefill_module=gen_batch_prefill_module, built=set(prebuilt))
    return {"flashinfer": library, "flashinfer.jit": jit}
