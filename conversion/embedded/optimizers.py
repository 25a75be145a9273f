"""Muon for the projections (arXiv 2502.16982 scaling), AdamW for the rest: embedding, norms, and
the index of the focus loss, which has a rate of its own.

Muon orthogonalises the momentum of a matrix, which reaches a loss in fewer tokens than AdamW on
models of this kind; `match_rms_adamw` gives it AdamW's update size, so that learning rates are
AdamW's as well. Fused projections are orthogonalised whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conversion.embedded.options import PretrainingOptions


class Optimizers:
    """Both optimizers, stepped as one."""

    def __init__(self, network: nn.Module, options: PretrainingOptions) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        index: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            is_matrix = parameter.dim() == 2 and "embedding" not in name
            kind = index if name.startswith("focus.") else matrices if is_matrix else others
            kind.append(parameter)
        self._muon = torch.optim.Muon(
            matrices,
            lr=options.matrix_rate,
            weight_decay=options.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in (others, index) if group],
            lr=options.other_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=options.device.startswith("cuda"),
        )
        self._peaks = ((options.matrix_rate,), (options.other_rate, options.focus_rate))

    def step(self, share: float) -> None:
        """Update at `share` of the peak learning rates, and clear the gradients."""
        for optimizer, peaks in zip((self._muon, self._adamw), self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
