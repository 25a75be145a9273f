"""The decoder that serves, as it trains: dense causal attention and a chunked loss.

Shapes: B sequences, T tokens each, E hidden size, V vocabulary, H query heads, N KV heads,
D head_dim, F = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from engine.model.config import ModelConfig
from engine.model.decoder import Decoder

LOSS_ROWS = 32_768  # positions whose logits are held at once


@dataclass(frozen=True, slots=True)
class BatchAttention:
    """Implements `engine.model.layers.Attention` for sequences of equal length, side by side."""

    length: int
    group_size: int

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        dtype = v_TND.dtype  # the product's, bfloat16 under autocast; norms come in float32
        q, k, v = (
            x.to(dtype).view(-1, self.length, *x.shape[1:]).transpose(1, 2)
            for x in (q_THD, k_TND, v_TND)
        )
        k, v = (x.repeat_interleave(self.group_size, 1) for x in (k, v))
        out_BHTD = scaled_dot_product_attention(q, k, v, is_causal=True)
        return out_BHTD.transpose(1, 2).flatten(0, 1)


class Network(nn.Module):
    """Token ids in, loss out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)

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

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [F, E] after the final norm."""
        length = ids_BT.shape[1]
        positions_F = torch.arange(length, device=ids_BT.device).repeat(len(ids_BT))
        attention = BatchAttention(length, self.config.group_size)
        hidden_FE: Tensor = self.decoder(ids_BT.flatten(), positions_F, attention)
        return hidden_FE

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
        """Weighted sum of losses in nats; logits are made in chunks and again in the backward."""
        hidden_FE = self.hidden(ids_BT)
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
