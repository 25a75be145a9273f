"""Prefill attention on a GPU by the fastest kernel that the host has; decided once.

Compute capability 9.0 in bfloat16 with pages of 64 tokens: the CUDA kernel, for local and for
retrieval heads, since it reads pages, chunks and ragged batches as they are and waits for nothing.
Anywhere else, and in float32: Triton's. Libraries (`kernels.prefill_libraries`) are measured beside
them by `rtpurbo bench attention`; for a whole prompt of one sequence cuDNN may be as fast, but a
server's chunks would make it two calls and a merge, and a gather of the whole context each time.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import cuda_prefill
from kernels._launch import KernelError, KernelLibrary
from kernels.block_age import AGE_RANGES
from kernels.prefill_tiles import MAX_MASSES, SAMPLED, PrefillTiles
from kernels.span_inputs import EVERYTHING, SpanInputs

SELECT_BYTES = 10  # of a block, tile and head: shares, lists, and a run of blocks' sums


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
            device: a GPU, or a CPU under Triton's interpreter, as tests do.
            library: compiled kernels, or None where there are none.

        Raises:
            ValueError: neither kernel takes such caches.
            ImportError: only Triton's would, and triton is not installed.
        """
        self._like = torch.empty((0, head_dim), dtype=dtype, device=device)
        self._block_tokens = block_tokens
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        takes = is_hopper and cuda_prefill.is_supported(dtype, head_dim, block_tokens)
        self.library = library if takes else None
        if self.library is None:
            from kernels import prefill_triton

            if not prefill_triton.is_supported(head_dim, block_tokens):
                raise ValueError(
                    f"no kernel for pages of {block_tokens} tokens with head_dim {head_dim}"
                )

    @property
    def name(self) -> Literal["CUDA", "Triton"]:
        """What the kernels of dense and windowed attention are written in."""
        return "Triton" if self.library is None else "CUDA"

    def try_out(self, index_dim: int | None, *, has_age_bias: bool = False) -> None:
        """Run every kernel once, so that it is compiled, and hold it to a known answer.

        Args:
            index_dim: of a sparse prefill; None: there will be none.
            has_age_bias: of its index.

        Raises:
            KernelError: it gives something else.
            Exception: whatever Triton and its compilers raise on a host that lacks what they need.
        """
        ones = self._like.new_ones((2, 1, self._block_tokens, self._like.shape[1]))
        zero = torch.zeros(1, dtype=torch.int64, device=ones.device)
        starts, lens_S = torch.tensor([[0, 3], [0, 3]], device=ones.device)
        q_THD, out_THD = ones[0, :, :3].transpose(0, 1), ones.new_zeros((3, 1, ones.shape[3]))
        tables_SB, ends = zero.view(1, 1), (starts, lens_S[1:])
        inputs = SpanInputs(q_THD, out_THD, zero, zero, ones, ones, tables_SB, *ends)
        self.attend_windowed(inputs, 2, 1, 1.0)
        results = [out_THD.clone()]
        self.attend_dense(inputs._replace(out_THD=out_THD.zero_()), 1.0)
        results.append(out_THD.clone())
        if index_dim is not None:
            index = ones.new_zeros((2, 1, self._block_tokens, index_dim))
            tiles = PrefillTiles.of_spans([0, 3], [3], ones.device)
            mass = torch.ones(1, device=ones.device)
            qi_TGI, emptied = index[0, :, :3].transpose(0, 1), out_THD.zero_()
            bias_GA = mass.new_zeros((1, AGE_RANGES)) if has_age_bias else None
            given = (inputs._replace(out_THD=emptied), tiles, qi_TGI, zero, index, mass, zero)
            self.attend_sparse(*given, 0, 1.0, age_bias_GA=bias_GA)
            results.append(emptied)
        # Every mean of ones is one.
        if not bool((torch.stack(results).float() - 1).abs().max() < 0.01):
            raise KernelError(f"the {self.name} kernels of prefill give wrong results here")

    def workspace_bytes(self, tokens: int, spans: int, heads: int, blocks: int) -> int:
        """Most memory that a call of `attend_sparse` takes; the others take one counter.

        Args:
            tokens, spans: of a step.
            heads: retrieval heads of a layer.
            blocks: of the longest context.
        """
        scored = cuda_prefill.tile_count(tokens, spans) * heads * blocks
        return 4 * min(scored * SAMPLED, MAX_MASSES) + scored * SELECT_BYTES

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
        index_scales: Tensor | None = None,
        age_bias_GA: Tensor | None = None,
    ) -> None:
        """Retrieval heads read what their tiles select: `score_tiles`, `select_tiles` and
        `prefill_sparse` of `kernels.reference`, written into `inputs.out_THD`.

        Args:
            tiles: of the inputs' spans, on their device; the same for all layers of a step.
            qi_TGI: index queries of the heads of the call, the others as in `prefill_sparse`.
        """
        from kernels.device_sparse_prefill import attend_lists, choose_lists, score_tiles

        tables_SB, block_tokens = inputs.block_tables_SB, inputs.k_cache.shape[2]
        index = (index_row_G, index_cache, tables_SB, tiles, index_scales, age_bias_GA)
        share_ZGB = score_tiles(qi_TGI, *index)
        lists = choose_lists(share_ZGB, top_p_G, tiles, dense_from_S, dense_below, block_tokens)
        attend_lists(self.library, inputs, tiles, lists, scale)

    def attend_dense(self, inputs: SpanInputs, scale: float) -> None:
        """`kernels.reference.prefill_dense` for some heads, written into `inputs.out_THD`."""
        self.attend_windowed(inputs, EVERYTHING, 0, scale)
