"""A loss that asks retrieval heads for few blocks of keys, and for blocks that an index can find.

Serving pays for every block that an index selects. How many those are is decided in training: by
how far a head spreads its attention, and by how much of that a small index, which compares queries
and keys before RoPE and knows ages of blocks only, can tell. Both are in the cross-entropy of
attention's block masses under the index's,

    H(attention, index) = entropy of attention + KL(attention || index)    nats,

so its gradient goes to the index and to the model. The index is there for this loss alone: a
conversion fits its own (`conversion.indexer_fit`), closer than any training under way could.

Shapes:

    Z sequences of L tokens, T = Z L, R sampled rows of each, H retrieval heads, N KV heads,
    X of them with index keys, D head_dim, I index_dim, B blocks, Q = Z R, A ranges of ages
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conversion.index_loss import HIDDEN, block_log_mass
from kernels.block_age import AGE_RANGES, row_ranges

INDEX_DIM, BLOCK_TOKENS = 16, 64
ROWS = 96  # sampled from every sequence
BIAS_UNIT = 10.0  # nats of a bias per unit of its parameter: biases move far, projections little


class FocusIndex(nn.Module):
    """The index of one layer's retrieval heads, and the loss under it."""

    def __init__(self, heads: tuple[int, ...], group_size: int, head_dim: int) -> None:
        super().__init__()
        self._heads = heads
        self._kv_heads = [head // group_size for head in heads]
        own = sorted(set(self._kv_heads))
        self._key_rows = [own.index(kv_head) for kv_head in self._kv_heads]
        self._key_heads = own
        self.q_proj_HID = nn.Parameter(torch.empty(len(heads), INDEX_DIM, head_dim))
        self.k_proj_XID = nn.Parameter(torch.empty(len(own), INDEX_DIM, head_dim))
        self.age_bias_HA = nn.Parameter(torch.zeros(len(heads), AGE_RANGES))

    def initialise(self, generator: torch.Generator) -> None:
        """One random projection of both keeps products on the average, as softmax scales them."""
        shape = self.q_proj_HID.shape[1:]
        deviation = (INDEX_DIM * shape[1] ** 0.5) ** -0.5
        projection_ID = torch.randn(shape, generator=generator) * deviation
        for parameter in (self.q_proj_HID, self.k_proj_XID):
            parameter.data.copy_(projection_ID.expand_as(parameter))

    def forward(
        self,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        rows_ZR: Tensor,
    ) -> Tensor:
        """Mean cross-entropy in nats over sequences, heads and rows, float32 scalar.

        Args:
            q_pre_THD: after QK-norm, before RoPE, as `k_pre_TND`; the other two after RoPE. L is a
                multiple of BLOCK_TOKENS.
            rows_ZR: int64, positions of the queries that are looked at.
        """
        sequences = len(rows_ZR)
        q_pre, k_pre, q, k = (
            x.reshape(sequences, -1, *x.shape[1:]) for x in (q_pre_THD, k_pre_TND, q_THD, k_TND)
        )
        with torch.autocast(q.device.type, enabled=False):
            q_ZRHD = _rows(q[:, :, self._heads], rows_ZR)
            k_ZLHD = k[:, :, self._kv_heads]
            scores_ZHRL = torch.einsum("zrhd,zlhd->zhrl", q_ZRHD, k_ZLHD).float()
            attention_ZHRB = _log_mass(scores_ZHRL * q.shape[-1] ** -0.5, rows_ZR)
            q_ZRHI = torch.einsum(
                "zrhd,hid->zrhi", _rows(q_pre[:, :, self._heads], rows_ZR).float(), self.q_proj_HID
            )
            k_ZLXI = torch.einsum(
                "zlxd,xid->zlxi", k_pre[:, :, self._key_heads].float(), self.k_proj_XID
            )
            index_ZHRL = torch.einsum("zrhi,zlhi->zhrl", q_ZRHI, k_ZLXI[:, :, self._key_rows])
            index_ZHRB = _log_mass(index_ZHRL, rows_ZR) + self._bias(rows_ZR, q.shape[1])
            log_p_ZHRB = attention_ZHRB.log_softmax(-1)
            log_q_ZHRB = index_ZHRB.log_softmax(-1)
            return -(log_p_ZHRB.exp() * log_q_ZHRB).sum(-1).mean()

    def _bias(self, rows_ZR: Tensor, length: int) -> Tensor:
        """Biases of all blocks for their ages, [Z, H, R, B]."""
        ranges_QB = row_ranges(rows_ZR.flatten() + 1, length // BLOCK_TOKENS, BLOCK_TOKENS)
        bias_HQB = self.age_bias_HA[:, ranges_QB] * BIAS_UNIT
        return bias_HQB.view(len(bias_HQB), *rows_ZR.shape, -1).transpose(0, 1)


def sampled_rows(weights_ZL: Tensor, ids_ZL: Tensor) -> Tensor:
    """Rows to look at, int64 [Z, R]; half of them are answers, where there are so many.

    Which ones follows from the ids, so that a resumed training takes the same.

    Args:
        weights_ZL: of the targets in the loss of code, above 1 for those of answers.
    """
    length = weights_ZL.shape[1]
    rows = min(ROWS, length)
    spread_L = torch.arange(length, device=weights_ZL.device, dtype=torch.float64) * 0.6180339887
    luck_ZL = (spread_L + ids_ZL.sum(1, keepdim=True).double() * 0.7548776662) % 1
    answers_ZR = (luck_ZL + (weights_ZL > 1)).topk(rows // 2, dim=1).indices
    any_ZR = (luck_ZL + 0.5).remainder(1).topk(rows - rows // 2, dim=1).indices
    return torch.cat([answers_ZR, any_ZR], dim=1)


def _rows(x_ZLHD: Tensor, rows_ZR: Tensor) -> Tensor:
    return x_ZLHD.take_along_dim(rows_ZR[:, :, None, None], dim=1)


def _log_mass(scores_ZHRL: Tensor, rows_ZR: Tensor) -> Tensor:
    """Logsumexp per block over keys up to each row's own; HIDDEN for later blocks."""
    keys_L = torch.arange(scores_ZHRL.shape[-1], device=scores_ZHRL.device)
    later_ZRL = keys_L > rows_ZR[:, :, None]
    return block_log_mass(scores_ZHRL.masked_fill(later_ZRL[:, None], HIDDEN), BLOCK_TOKENS)
