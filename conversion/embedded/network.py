"""The decoder that serves, as it trains: whole sequences and a chunked loss.

Shapes: B sequences, T tokens each, E hidden size, V vocabulary, F = B * T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from conversion.embedded.attention import TrainingAttention
from conversion.student_layers import StudentLayers
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder

LOSS_ROWS = 32_768  # positions whose logits are held at once


class Network(nn.Module):
    """Token ids in, loss out."""

    def __init__(self, config: ModelConfig, roles: StudentLayers | None = None) -> None:
        """`roles` are those of the heads in sequences that are limited to them."""
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.roles = roles

    def initialise(self, seed: int) -> None:
        """Normal weights; what writes to the residual stream starts smaller, as in GPT-2."""
        generator = torch.Generator("cpu").manual_seed(seed)
        small = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.decoder.named_parameters():
            if parameter.dim() < 2:
                continue  # norms begin at 1
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.02 * (small if writes else 1.0)
            values = torch.randn(parameter.shape, generator=generator) * deviation
            parameter.data.copy_(values)

    def hidden(self, ids_BT: Tensor, limited: int = 0) -> Tensor:
        """Hidden states [F, E] after the final norm; the first `limited` sequences by roles."""
        length = ids_BT.shape[1]
        positions_F = torch.arange(length, device=ids_BT.device).repeat(len(ids_BT))
        attention = TrainingAttention(length, self.config.group_size, limited, self.roles)
        hidden_FE: Tensor = self.decoder(ids_BT.flatten(), positions_F, attention)
        return hidden_FE

    def forward(
        self, ids_BT: Tensor, targets_BT: Tensor, weights_BT: Tensor, limited: int = 0
    ) -> Tensor:
        """Weighted sum of losses in nats; logits are made in chunks and again in the backward."""
        hidden_FE = self.hidden(ids_BT, limited)
        total = hidden_FE.new_zeros((), dtype=torch.float32)
        targets_F, weights_F = targets_BT.flatten(), weights_BT.flatten()
        for start in range(0, len(hidden_FE), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            total = total + checkpoint(
                _loss_sum,
                hidden_FE[rows],
                self.decoder.embedding.weight,
                targets_F[rows],
                weights_F[rows],
                use_reentrant=False,
            )
        return total


def _loss_sum(hidden_RE: Tensor, weight_VE: Tensor, targets_R: Tensor, weights_R: Tensor) -> Tensor:
    logits_RV = linear(hidden_RE, weight_VE).float()
    return (cross_entropy(logits_RV, targets_R, reduction="none") * weights_R).sum()
