"""Plain causal attention over one whole sequence: the slow, obvious way, without a cache."""

from __future__ import annotations

import torch
from torch import Tensor


class DenseAttention:
    """Implements `engine.model.layers.Attention` for one sequence that is computed at once.

    Memory grows with the square of its length: for oracles and short texts.
    """

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        group = q_THD.shape[1] // k_TND.shape[1]
        k_THD = k_TND.repeat_interleave(group, dim=1)
        v_THD = v_TND.repeat_interleave(group, dim=1)
        scores_HTT = torch.einsum("thd,shd->hts", q_THD, k_THD) * q_THD.shape[-1] ** -0.5
        future = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
        weights_HTT = scores_HTT.masked_fill(future, float("-inf")).softmax(-1, torch.float32)
        return torch.einsum("hts,shd->thd", weights_HTT.to(v_THD.dtype), v_THD)
