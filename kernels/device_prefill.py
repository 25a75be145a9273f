"""Prefill attention on a GPU by the fastest kernel that the host has; decided once.

Compute capability 9.0 in bfloat16 with pages of 64 tokens: the CUDA kernel, for local and for
retrieval heads, since it reads pages, chunks and ragged batches as they are and waits for nothing.
Anywhere else, and in float32: Triton's. Libraries (`kernels.prefill_libraries`) are measured beside
them by `rtpurbo bench attention`; for a whole prompt of one sequence cuDNN may be as fast, but a
server's chunks would make it two calls and a merge, and a gather of the whole context each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cuda_prefill
from kernels._launch import KernelLibrary
from kernels.prefill_sparse import select_tiles
from kernels.prefill_tiles import PrefillTiles
from kernels.span_inputs import EVERYTHING, SpanInputs


class DevicePrefill:
    """Attention of prompt tokens for caches of one kind."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        block_tokens: int,
        library: KernelLibrary | None,
    ) -> None:
        """
        Args:
            library: compiled kernels, or None where there are none.

        Raises:
            ValueError: neither kernel takes such caches.
            ImportError: only Triton's would, and triton is not installed.
        """
        is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
        takes = is_hopper and cuda_prefill.is_supported(dtype, head_dim, block_tokens)
        self.library = library if takes else None
        if self.library is None:
            from kernels import prefill_triton

            if not prefill_triton.is_supported(head_dim, block_tokens):
                raise ValueError(
                    f"no kernel for pages of {block_tokens} tokens with head_dim {head_dim}"
                )

    def attend_windowed(self, inputs: SpanInputs, window: int, sinks: int, scale: float) -> None:
        """`kernels.reference.prefill_windowed` for some heads, written into `inputs.out_THD`."""
        if self.library is not None:
            cuda_prefill.attend_spans(self.library, inputs, window, sinks, scale)
            return
        from kernels.prefill_triton import attend_spans

        attend_spans(inputs, window, sinks, scale)

    def attend_sparse(
        self,
        inputs: SpanInputs,
        tiles: PrefillTiles,
        qi_TGI: Tensor,
        index_row_G: Tensor,
        index_cache: Tensor,
        top_p_G: Tensor,
        dense_from_S: Tensor,
        dense_below: int,
        scale: float,
    ) -> None:
        """Retrieval heads read what their tiles select: `score_tiles`, `select_tiles` and
        `prefill_sparse` of `kernels.reference`, written into `inputs.out_THD`.

        Args:
            tiles: of the inputs' spans, on their device; the same for all layers of a step.
            qi_TGI: index queries of the heads of the call, the others as in `prefill_sparse`.
        """
        from kernels.device_sparse_prefill import attend_lists, list_kept, score_tiles

        tables_SB, block_tokens = inputs.block_tables_SB, inputs.k_cache.shape[2]
        share_ZGB = score_tiles(qi_TGI, index_row_G, index_cache, tables_SB, tiles)
        mask_ZGB = select_tiles(share_ZGB, top_p_G, tiles, dense_from_S, dense_below, block_tokens)
        attend_lists(self.library, inputs, tiles, list_kept(mask_ZGB), scale)

    def attend_dense(self, inputs: SpanInputs, scale: float) -> None:
        """`kernels.reference.prefill_dense` for some heads, written into `inputs.out_THD`."""
        self.attend_windowed(inputs, EVERYTHING, 0, scale)
