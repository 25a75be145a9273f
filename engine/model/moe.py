"""Mixture of experts as in Qwen3-MoE: softmax router, top-k experts, weighted sum.

Shapes: T tokens, E hidden size, X experts, F intermediate size of an expert, k experts per token,
J = T k pairs of token and chosen expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import MoeConfig
from engine.model.layer_kernels import LayerKernels


class MoeMlp(nn.Module):
    """Experts are stacked: gate_up [X, 2F, E], down [X, E, F]."""

    def __init__(self, hidden: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        size = config.intermediate_size
        self.router = nn.Linear(hidden, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * size, hidden))
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden, size))

    def forward(self, x_TE: Tensor, kernels: LayerKernels | None = None) -> Tensor:
        """Each expert that was chosen runs once, on all pairs that chose it.

        A token's results are summed in the order of its own choices: what stands beside it in the
        batch cannot change that order. With kernels the host learns nothing of the choice.
        """
        if kernels is not None and kernels.takes_experts(len(x_TE), self.config):
            logits_TX = self.router(x_TE)
            weights_Tk, results_TkE = kernels.run_experts(
                x_TE, logits_TX, self.gate_up, self.down, self.config
            )
        else:
            weights_Tk, results_TkE = self._run_sorted(x_TE)
        return torch.einsum("tk,tke->te", weights_Tk, results_TkE)

    def _run_sorted(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, k] and results [T, k, E] by products over pairs that are sorted by expert."""
        weights_Tk, experts_Tk = self._route(x_TE)
        experts_J = experts_Tk.flatten()
        order_J = experts_J.argsort(stable=True)
        sizes = torch.bincount(experts_J, minlength=self.config.num_experts).tolist()
        inputs_JE = x_TE[order_J // self.config.experts_per_token]
        groups = enumerate(torch.split(inputs_JE, sizes))
        sorted_JE = torch.cat([self._expert(i, rows) for i, rows in groups if len(rows)])
        return weights_Tk, sorted_JE[order_J.argsort()].view(*experts_Tk.shape, -1)

    def _route(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in the model's dtype and expert ids, both [T, k]."""
        probabilities_TX = self.router(x_TE).softmax(-1, dtype=torch.float32)
        weights_Tk, experts_Tk = probabilities_TX.topk(self.config.experts_per_token, dim=-1)
        if self.config.normalize_weights:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        return weights_Tk.to(x_TE.dtype), experts_Tk

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate_up[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down[expert])
