"""Prefill attention on a GPU by the fastest kernel that the host has; decided once.

Compute capability 9.0 in bfloat16 with pages of 64 tokens: the CUDA kernel, for local and for
retrieval heads, since it reads pages, chunks and ragged batches as they are and waits for nothing.
Anywhere else, and in float32: Triton's. Libraries (`kernels.prefill_libraries`) are measured beside
them by `rtpurbo bench attention`; for a whole prompt of one sequence cuDNN may be as fast, but a
server's chunks would make it two calls and a merge, and a gather of the whole context each time.
"""

from __future__ import annotations

import torch

from kernels import cuda_prefill
from kernels._launch import KernelLibrary
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

    def attend_dense(self, inputs: SpanInputs, scale: float) -> None:
        """`kernels.reference.prefill_dense` for some heads, written into `inputs.out_THD`."""
        self.attend_windowed(inputs, EVERYTHING, 0, scale)
