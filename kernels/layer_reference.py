"""The specification of what a layer does around attention: norms, RoPE, stores, gates.

Every function has the signature of its twin in `kernels.cuda_store`, `cuda_layer` or `cuda_experts`
without the library. Sums are float32; a value is rounded to its tensor's dtype where it is written
down, and before the weight of a norm (as transformers does). Shapes as in `kernels.layer_inputs`;
E hidden, F intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_inputs import HeadNorm, IndexProjections, StoredPool, StoredQkv
from kernels.reference import project_index, store_index_keys, store_kv


def store_qkv(
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
    """Norm and turn queries and keys, write keys, values and index keys to their pages.

    Args:
        projected_TRD: R = H + 2 N heads of a token: queries, keys, values.
        heads: H.
        norm: of queries and keys; None in models without it.
        cos_TF, sin_TF: float32 [T, D / 2], pairs (i, i + D / 2) are turned by them.
        kv_row_N: int32, row of each KV head in the full pool, or -1 - row in the window pool.
        full, window: the pools; None where no head lives there.
        index: of heads that select their blocks; made from heads after the norm and before RoPE.
    """
    kv_heads = len(kv_row_N)
    q_THD, k_TND, v_TND = torch.split(projected_TRD, [heads, kv_heads, kv_heads], dim=1)
    if norm is not None:
        q_weight_D, k_weight_D = norm.weight_2D.chunk(2)
        q_THD = q_weight_D * _normalised(q_THD, norm.eps)
        k_TND = k_weight_D * _normalised(k_TND, norm.eps)
    turned_TND = _rotated(k_TND, cos_TF, sin_TF)
    for pool, heads_in in ((full, kv_row_N >= 0), (window, kv_row_N < 0)):
        if pool is None:
            continue
        members = heads_in.nonzero().flatten()
        rows = torch.where(kv_row_N >= 0, kv_row_N, -1 - kv_row_N)[members]
        members = members[rows.argsort()]
        store_kv(
            turned_TND[:, members], v_TND[:, members], pool.k_cache, pool.v_cache, pool.slots_T
        )
    turned_THD = _rotated(q_THD, cos_TF, sin_TF)
    if index is None:
        return StoredQkv(turned_THD, None, None)
    keys_TXI = project_index(k_TND, index.k_proj_XID, index.k_head_X).to(k_TND.dtype)
    wanted = q_THD[: index.query_tokens]
    queries_QSI = project_index(wanted, index.q_proj_SID, index.q_head_S).to(q_THD.dtype)
    if index.index_cache is None:
        return StoredQkv(turned_THD, queries_QSI, keys_TXI)
    assert full is not None, "index keys share the full pool's pages"
    store_index_keys(keys_TXI, index.index_cache, full.slots_T, index.index_scales)
    return StoredQkv(turned_THD, queries_QSI, None)


def add_norm(
    x_TE: Tensor, branch_TE: Tensor | None, weight_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum of a residual stream and a branch (None: nothing), and its RMS norm."""
    sum_TE = x_TE if branch_TE is None else x_TE + branch_TE
    return sum_TE, weight_E * _normalised(sum_TE, eps)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up, [T, F], of [T, 2 F] with gate and up side by side."""
    gate_TF, up_TF = gate_up_TF.float().chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF).to(gate_up_TF.dtype)


def route_experts(logits_TX: Tensor, chosen: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token, int32 by falling probability, and their weights: both [T, k].

    Of experts that are as probable the lower number comes first. With `normalise` the weights of a
    token sum to 1.
    """
    probabilities_TX = logits_TX.softmax(-1, dtype=torch.float32)
    sorted_TX, experts_TX = probabilities_TX.sort(dim=-1, descending=True, stable=True)
    weights_Tk = sorted_TX[:, :chosen]
    if normalise:
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
    return weights_Tk.to(logits_TX.dtype), experts_TX[:, :chosen].int()


def gate_experts(x_TE: Tensor, experts_Tk: Tensor, gate_up_XGE: Tensor) -> Tensor:
    """silu(gate) * up of each token with each of its experts, [T k, F]; G = 2 F."""
    rows = [
        gate_up_XGE[expert].float() @ x_TE[token].float()
        for token, chosen in enumerate(experts_Tk.tolist())
        for expert in chosen
    ]
    return silu_mul(torch.stack(rows)).to(x_TE.dtype)


def project_experts(inner_JF: Tensor, experts_Tk: Tensor, down_XEF: Tensor) -> Tensor:
    """Each pair's row times its expert's weights, [T k, E]."""
    experts = experts_Tk.flatten().tolist()
    rows = [
        down_XEF[expert].float() @ row.float()
        for row, expert in zip(inner_JF, experts, strict=True)
    ]
    return torch.stack(rows).to(inner_JF.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotated(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    first, second = x_THD.float().chunk(2, dim=-1)
    cos, sin = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_THD.dtype)
