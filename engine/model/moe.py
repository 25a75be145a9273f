"""Mixture of experts as in Qwen3-MoE: softmax router, top-k experts, weighted sum.

Shapes: T tokens, E hidden size, X experts, F intermediate size of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import MoeConfig


class MoeMlp(nn.Module):
    """Experts are stacked: gate_up [X, 2F, E], down [X, E, F]."""

    def __init__(self, hidden: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        size = config.intermediate_size
        self.router = nn.Linear(hidden, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * size, hidden))
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden, size))

    def forward(self, x_TE: Tensor) -> Tensor:
        weights_Tk, experts_Tk = self._route(x_TE)
        out_TE = torch.zeros_like(x_TE)
        for expert in sorted(set(experts_Tk.flatten().tolist())):
            tokens, choice = torch.where(experts_Tk == expert)
            gate, up = F.linear(x_TE[tokens], self.gate_up[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.down[expert])
            out_TE = out_TE.index_add(0, tokens, result * weights_Tk[tokens, choice, None])
        return out_TE

    def _route(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in the model's dtype and expert ids, both [T, experts_per_token]."""
        probabilities_TX = self.router(x_TE).float().softmax(-1)
        weights, experts = probabilities_TX.topk(self.config.experts_per_token, dim=-1)
        if self.config.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x_TE.dtype), experts
