"""The decoder that serves, as it trains: whole sequences and a chunked loss.

Shapes: B sequences, T tokens each, E hidden size, V vocabulary, F = B * T.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from conversion.embedded.attention import TrainingAttention
from conversion.embedded.focus import FocusIndex, sampled_rows
from conversion.student_layers import StudentLayers
from engine.model.checkpoint import preflight
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder

LOSS_ROWS = 32_768  # positions whose logits are held at once


class Losses(NamedTuple):
    """Sums over targets by weight, float32 scalars; see `Phase` for what each is for."""

    code: Tensor  # nats of the next token; the mean of both ways where sequences are seen both ways
    agreement: Tensor  # half of KL(dense || limited) + KL(limited || dense), nats
    focus: Tensor  # cross-entropy of attention under an index, the mean times the weights' sum


class Network(nn.Module):
    """Token ids in, losses out."""

    def __init__(self, config: ModelConfig, roles: StudentLayers | None = None) -> None:
        """`roles` are those of the heads in sequences that are limited to them."""
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.roles = roles
        self.focus = nn.ModuleDict()  # by layer, where there are retrieval heads
        for layer, heads in enumerate(roles.heads if roles is not None else ()):
            if heads.far:
                index = FocusIndex(heads.far, config.group_size, config.head_dim)
                self.focus[str(layer)] = index

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
        for index in self.focus.values():
            assert isinstance(index, FocusIndex)
            index.initialise(generator)

    def load(self, model: Path) -> None:
        """The weights of a model folder of this shape, in place.

        Raises:
            CheckpointError: one line that names the file.
        """
        weights = load_decoder(preflight(model), "cpu", torch.float32)
        self.decoder.load_state_dict(weights.state_dict())

    def hidden(self, ids_BT: Tensor, limited: int = 0) -> Tensor:
        """Hidden states [F, E] after the final norm; the first `limited` sequences by roles."""
        return self._hidden(ids_BT, self._attention(ids_BT, limited))

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        limited: int = 0,
        *,
        both: bool = False,
        focus: bool = False,
    ) -> Losses:
        """Losses of a batch; logits are made in chunks and again in the backward.

        Args:
            limited: of the sequences, the first ones, are seen by roles.
            both: all sequences are seen by roles and dense as well; `limited` counts nothing.
            focus: the loss of that name, of limited sequences, is wanted; else it is 0.
        """
        limited = len(ids_BT) if both else limited
        seen_BT = torch.cat([ids_BT, ids_BT]) if both else ids_BT
        attention = self._attention(seen_BT, limited)
        if focus and limited:
            attention.focus = self.focus
            attention.rows_ZR = sampled_rows(weights_BT[:limited], ids_BT[:limited])
        hidden_FE = self._hidden(seen_BT, attention)
        code = agreement = hidden_FE.new_zeros((), dtype=torch.float32)
        ways = hidden_FE.chunk(2) if both else (hidden_FE,)
        targets_F, weights_F = targets_BT.flatten(), weights_BT.flatten()
        for start in range(0, len(targets_F), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            sums = checkpoint(
                _loss_sums,
                [way_FE[rows] for way_FE in ways],
                self.decoder.embedding.weight,
                targets_F[rows],
                weights_F[rows],
                use_reentrant=False,
            )
            code, agreement = code + sums[0], agreement + sums[1]
        spread = attention.focus_losses
        mean = torch.stack(spread).mean() if spread else torch.zeros_like(code)
        return Losses(code, agreement, mean * weights_F.sum())

    def _attention(self, ids_BT: Tensor, limited: int) -> TrainingAttention:
        return TrainingAttention(ids_BT.shape[1], self.config.group_size, limited, self.roles)

    def _hidden(self, ids_BT: Tensor, attention: TrainingAttention) -> Tensor:
        positions_F = torch.arange(ids_BT.shape[1], device=ids_BT.device).repeat(len(ids_BT))
        hidden_FE: Tensor = self.decoder(ids_BT.flatten(), positions_F, attention)
        return hidden_FE


def _loss_sums(
    ways_RE: list[Tensor], weight_VE: Tensor, targets_R: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Of rows seen one way or two: the mean cross-entropy, and how far the two are apart."""
    logits_RV = [linear(hidden_RE, weight_VE).float() for hidden_RE in ways_RE]
    losses_R = [cross_entropy(logits, targets_R, reduction="none") for logits in logits_RV]
    code = (torch.stack(losses_R).mean(0) * weights_R).sum()
    if len(ways_RE) == 1:
        return code, torch.zeros_like(code)
    one_RV, other_RV = (logits.log_softmax(-1) for logits in logits_RV)
    both_R = ((one_RV.exp() - other_RV.exp()) * (one_RV - other_RV)).sum(-1)
    return code, (both_R / 2 * weights_R).sum()
