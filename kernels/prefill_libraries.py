"""Dense prefill by the attention that libraries bring: cuDNN and FlashAttention-2 through PyTorch,
FlashInfer's FA3 where it is installed (extra `flashinfer`).

They know neither head maps nor, but for FlashInfer, pages. Keys and values of each span are
gathered in order first (a copy: 2 to 3 ms of 2,900 at a million tokens and five heads), and a chunk
of a longer context is attended in two parts, what was before it and its own diagonal, merged by
their log-sum-exps: cuDNN's causal mask starts at the first key. FlashInfer reads pages and chunks
as they are, in a call for each KV head, since its heads come in equal groups.

All wait for nothing but need the spans' lengths on the host.

Shapes: G heads of the call, T queries of a span, C keys; the others as in `kernels.span_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.head_groups import heads_by_row
from kernels.softmax_attention import merge
from kernels.span_inputs import SpanInputs

Backend = Literal["cudnn", "flash", "flashinfer"]
WORKSPACE_BYTES = 2**27


class Span(NamedTuple):
    """Rows of a span among the queries, and its context length."""

    rows: slice
    context: int


def available() -> tuple[Backend, ...]:
    """Backends of this host, best guess first."""
    found: list[Backend] = []
    if find_spec("flashinfer") is not None:
        found.append("flashinfer")
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        found.append("cudnn")
    return (*found, "flash")


def attend_dense(backend: Backend, inputs: SpanInputs, spans: Sequence[Span], scale: float) -> None:
    """Causal attention of some heads, written to their places in the output.

    Args:
        inputs: bfloat16 or float16, on a GPU.
        spans: the same as `query_starts` and `context_lens_S`, which are not read.
    """
    if backend == "flashinfer":
        _attend_flashinfer(inputs, spans, scale)
        return
    attend = _cudnn if backend == "cudnn" else _flash
    for index, span in enumerate(spans):
        q_GTD = inputs.q_THD[span.rows][:, inputs.heads_G].transpose(0, 1)
        k_GCD, v_GCD = (_gather(inputs, cache, index, span) for cache in inputs[4:6])
        out_GTD = _causal(attend, q_GTD, k_GCD, v_GCD, scale)
        inputs.out_THD[span.rows, inputs.heads_G] = out_GTD.transpose(0, 1)


Attend = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


def _causal(attend: Attend, q_GTD: Tensor, k_GCD: Tensor, v_GCD: Tensor, scale: float) -> Tensor:
    """The last T of C positions attend causally to all C."""
    before = k_GCD.shape[1] - q_GTD.shape[1]
    own = attend(q_GTD, k_GCD[:, before:], v_GCD[:, before:], True, scale)
    if not before:
        return own[0]
    return merge([attend(q_GTD, k_GCD[:, :before], v_GCD[:, :before], False, scale), own])


def _gather(inputs: SpanInputs, cache: Tensor, span: int, of: Span) -> Tensor:
    """Keys or values of a span's context for each head of the call: [G, C, D], a copy."""
    blocks = -(-of.context // cache.shape[2])
    pages_B = inputs.block_tables_SB[span, :blocks]
    return cache[pages_B[None], inputs.kv_row_G[:, None]].flatten(1, 2)[:, : of.context]


def _cudnn(
    q_GTD: Tensor, k_GCD: Tensor, v_GCD: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_GTD[None], k_GCD[None], v_GCD[None], None, True, 0.0, causal, False, scale=scale
    )
    return found[0][0], found[1].reshape(q_GTD.shape[:2])


def _flash(
    q_GTD: Tensor, k_GCD: Tensor, v_GCD: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q_GTD[None], k_GCD[None], v_GCD[None], 0.0, causal, False, scale=scale
    )
    return found[0][0], found[1].reshape(q_GTD.shape[:2])


def _attend_flashinfer(inputs: SpanInputs, spans: Sequence[Span], scale: float) -> None:
    import flashinfer  # type: ignore[import-not-found,unused-ignore]

    device, block = inputs.q_THD.device, inputs.k_cache.shape[2]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    blocks = [-(-span.context // block) for span in spans]
    pages = [inputs.block_tables_SB[i, :count] for i, count in enumerate(blocks)]
    last = [span.context - (count - 1) * block for span, count in zip(spans, blocks, strict=True)]
    layout = (
        _int32([0, *(span.rows.stop for span in spans)], device),
        _int32([0, *blocks], device).cumsum(0, dtype=torch.int32),
        torch.cat(pages).int(),
        _int32(last, device),
    )
    for kv_row, members in heads_by_row(inputs.kv_row_G):
        heads = inputs.heads_G[members]
        wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "HND", backend="fa3"
        )
        wrapper.plan(
            *layout,
            len(members),
            1,
            inputs.q_THD.shape[2],
            block,
            causal=True,
            sm_scale=scale,
            q_data_type=inputs.q_THD.dtype,
        )
        caches = tuple(cache[:, kv_row : kv_row + 1] for cache in inputs[4:6])
        inputs.out_THD[:, heads] = wrapper.run(inputs.q_THD[:, heads].contiguous(), caches)


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
