"""Softmax attention that also returns its log-sum-exp, so that parts of a context can be merged.

Shapes: Z batch, G query heads that share one KV head, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORES = 2**25  # scores held at once by the portable path; 128 MiB in float32


def attend_with_lse(
    q_ZGTD: Tensor,
    k_ZSD: Tensor,
    v_ZSD: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias_TS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output [Z, G, T, D] and log-sum-exp of the scaled scores, float32 [Z, G, T].

    Args:
        causal: query t sees keys up to t (T must equal S); excludes `bias_TS`.
        bias_TS: added to the scores, 0 or -inf; every query must see a key.
    """
    group = q_ZGTD.shape[1]
    if q_ZGTD.device.type == "cpu" and q_ZGTD.dtype == torch.float32:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_ZGTD,
            k_ZSD.unsqueeze(1).expand(-1, group, -1, -1),
            v_ZSD.unsqueeze(1).expand(-1, group, -1, -1),
            0.0,
            causal,
            attn_mask=None if bias_TS is None else bias_TS.expand(1, 1, -1, -1),
            scale=scale,
        )
        return out, lse
    return _portable(q_ZGTD, k_ZSD, v_ZSD, scale, causal, bias_TS)


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine attention over disjoint sets of keys, given (output, log-sum-exp) of each."""
    if len(parts) == 1:
        return parts[0][0]
    lse = torch.stack([lse for _, lse in parts])
    weights = lse.softmax(0).unsqueeze(-1)
    out = sum(
        (weight * out.float() for weight, (out, _) in zip(weights, parts, strict=True)),
        start=torch.zeros((), device=lse.device),
    )
    return out.to(parts[0][0].dtype)


def _portable(
    q_ZGTD: Tensor,
    k_ZSD: Tensor,
    v_ZSD: Tensor,
    scale: float,
    causal: bool,
    bias_TS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch for every device and dtype, by slices of the queries."""
    batch, group, queries, _ = q_ZGTD.shape
    out = torch.empty_like(q_ZGTD)
    lse = q_ZGTD.new_empty(q_ZGTD.shape[:3], dtype=torch.float32)
    step = max(1, MAX_SCORES // (batch * group * k_ZSD.shape[1]))
    columns = torch.arange(k_ZSD.shape[1], device=q_ZGTD.device)
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        scores = torch.einsum("zgtd,zsd->zgts", q_ZGTD[:, :, rows], k_ZSD).float() * scale
        if bias_TS is not None:
            scores += bias_TS[rows]
        if causal:
            positions = torch.arange(rows.start, rows.stop, device=q_ZGTD.device)
            scores.masked_fill_(columns > positions[:, None], float("-inf"))
        lse[:, :, rows] = scores.logsumexp(-1)
        weights = (scores - lse[:, :, rows, None]).exp().to(v_ZSD.dtype)
        out[:, :, rows] = torch.einsum("zgts,zsd->zgtd", weights, v_ZSD)
    return out, lse
