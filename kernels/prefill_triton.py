"""Prefill attention by Triton: the portable kernel, on every chip that Triton compiles for.

Under Triton's interpreter (TRITON_INTERPRET=1 before the first import) it also runs on a CPU, which
is how the tests compare it with its twin.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.span_attention import span_attention
from kernels.span_inputs import SpanInputs


class TileConfig(NamedTuple):
    """How one program computes."""

    queries: int  # rows of a tile
    warps: int
    stages: int  # pages in flight
    registers: int | None = None  # limit per thread, so that programs share a multiprocessor

    @classmethod
    def default(cls, dtype: torch.dtype) -> TileConfig:
        """Small enough that two programs share a multiprocessor of an H100: one takes its softmax
        while the other multiplies."""
        return cls(16, 8, 1) if dtype == torch.float32 else cls(64, 4, 2)


MIN_SPANS = 32  # looked through by a program: fewer would only mean more variants to compile
# Of head_dim 128 and 64; `benchmarks.prefill_sweep` times them.
SWEEP = (
    TileConfig(64, 4, 2),
    TileConfig(64, 4, 2, 168),
    TileConfig(64, 4, 3),
    TileConfig(128, 8, 2),
    TileConfig(128, 8, 3),
)


def is_supported(head_dim: int, block_tokens: int) -> bool:
    """Whether the kernel takes such pages: powers of two, at least 16."""
    return all(n >= 16 and n & (n - 1) == 0 for n in (head_dim, block_tokens))


def attend_spans(
    inputs: SpanInputs, window: int, sinks: int, scale: float, config: TileConfig | None = None
) -> None:
    """Attention of some heads of a layer, written to their places in the output.

    The rule is `kernels.reference.prefill_windowed`'s; a window of `EVERYTHING` is causal
    attention. Launches one kernel and waits for nothing.

    Args:
        inputs: bfloat16, float16 or float32.
        scale: positive factor on q·k.

    Raises:
        ValueError: shapes that do not fit, or pages that `is_supported` refuses.
    """
    inputs.check()
    q_THD, out_THD, _, _, k_cache, v_cache, tables_SB, _, context_lens_S = inputs
    _, cache_heads, keys, dim = k_cache.shape
    if not is_supported(dim, keys):
        raise ValueError(f"no kernel for pages of {keys} tokens with head_dim {dim}")
    config = config or TileConfig.default(q_THD.dtype)
    spans, group = context_lens_S.shape[0], inputs.heads_G.shape[0]
    tiles = q_THD.shape[0] // config.queries + spans  # at least as many as there are
    options = {} if config.registers is None else {"maxnreg": config.registers}
    span_attention[(tiles * group,)](
        *inputs._replace(k_cache=pages_of(k_cache), v_cache=pages_of(v_cache)),
        spans,
        tiles,
        group,
        *q_THD.stride()[:2],
        *out_THD.stride()[:2],
        tables_SB.stride(0),
        cache_heads,
        window,
        sinks,
        scale * math.log2(math.e),
        DIM=dim,
        QUERIES=config.queries,
        KEYS=keys,
        SPANS=max(MIN_SPANS, triton.next_power_of_2(spans)),
        STAGES=config.stages,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        **options,
    )


def pages_of(cache: Tensor) -> Any:
    """The cache as rows, of which a load takes one KV head's page."""
    _, _, keys, dim = cache.shape
    return TensorDescriptor.from_tensor(cache.view(-1, dim), [keys, dim])
