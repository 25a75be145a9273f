"""Attention of the sparse student, differentiable: what serving computes, for whole sequences.

The rules are those of `kernels.reference`. Local heads see a window and the sinks at every
position; retrieval heads see everything from prompt positions, and from response positions the
blocks that the indexer selects. Selecting has no gradient, attending to what was selected has.

No matrix of tokens by tokens is ever built: windows are folded into blocks, and only response rows
(some hundreds) meet every key. Shapes:

    Z sequences of one batch, L tokens of each, P of them prompt, R = L - P response rows,
    T = Z L tokens, H query heads, N KV heads, D head_dim, I index_dim, X rows of index keys,
    B blocks of a sequence, W = B times block_tokens, Q = Z R, F tokens of a fold, S sink slots,
    b folds of a sequence
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from conversion.index_loss import block_log_mass
from conversion.student_layers import StudentLayers
from kernels.block_age import age_bias
from kernels.indexer import project_index, select_blocks

MAX_SCORES = 2**27  # index scores held at once, float32


@dataclass(frozen=True, slots=True)
class StudentAttention:
    """Implements `engine.model.layers.Attention` for sequences of one length, one after another."""

    layers: StudentLayers
    sequences: int
    prompt: int  # tokens of each sequence under the prefill rule; the others are responses

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        heads = self.layers.heads[layer]
        q_ZHLD, k_ZNLD, v_ZNLD = (self._by_sequence(x) for x in (q_THD, k_TND, v_TND))
        outs_ZLD: dict[int, Tensor] = {}
        if heads.far:
            picked = self._pick(heads.far, q_ZHLD, k_ZNLD, v_ZNLD)
            with torch.no_grad():
                seen_ZHRL = self._selected(layer, q_pre_THD, k_pre_TND)
            out_ZHLD = self._retrieve(*picked, seen_ZHRL)
            outs_ZLD.update(zip(heads.far, out_ZHLD.unbind(1), strict=True))
        if heads.near:
            out_ZHLD = self._window(*self._pick(heads.near, q_ZHLD, k_ZNLD, v_ZNLD))
            outs_ZLD.update(zip(heads.near, out_ZHLD.unbind(1), strict=True))
        return torch.stack([outs_ZLD[head] for head in range(len(outs_ZLD))], dim=2).flatten(0, 1)

    def _pick(
        self, heads: tuple[int, ...], q_ZHLD: Tensor, k_ZNLD: Tensor, v_ZNLD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of some heads with their KV heads' keys and values, all [Z, heads, L, D].

        Stacked rather than indexed: the gradient of an index with repeats is a slow scatter.
        """
        group = self.layers.config.group_size
        q, k, v = (x.unbind(1) for x in (q_ZHLD, k_ZNLD, v_ZNLD))
        return (
            torch.stack([q[head] for head in heads], dim=1),
            torch.stack([k[head // group] for head in heads], dim=1),
            torch.stack([v[head // group] for head in heads], dim=1),
        )

    def _by_sequence(self, x_TAD: Tensor) -> Tensor:
        """[T, heads, D] as [Z, heads, L, D]."""
        return x_TAD.reshape(self.sequences, -1, *x_TAD.shape[1:]).transpose(1, 2)

    def _retrieve(
        self, q_ZHLD: Tensor, k_ZHLD: Tensor, v_ZHLD: Tensor, seen_ZHRL: Tensor | None
    ) -> Tensor:
        """Causal attention; response rows to what they selected. None: they see everything."""
        if seen_ZHRL is None:
            return scaled_dot_product_attention(q_ZHLD, k_ZHLD, v_ZHLD, is_causal=True)
        q_ZHPD, k_ZHPD, v_ZHPD = (x[:, :, : self.prompt] for x in (q_ZHLD, k_ZHLD, v_ZHLD))
        q_ZHRD = q_ZHLD[:, :, self.prompt :]
        out_ZHPD = scaled_dot_product_attention(q_ZHPD, k_ZHPD, v_ZHPD, is_causal=True)
        out_ZHRD = scaled_dot_product_attention(q_ZHRD, k_ZHLD, v_ZHLD, attn_mask=seen_ZHRL)
        return torch.cat([out_ZHPD, out_ZHRD], dim=2)

    def _window(self, q_ZHLD: Tensor, k_ZHLD: Tensor, v_ZHLD: Tensor) -> Tensor:
        """Window and sinks: folded blocks of queries over their own block and the one before."""
        length = q_ZHLD.shape[2]
        if length <= self.layers.sparse.window_tokens:
            return scaled_dot_product_attention(q_ZHLD, k_ZHLD, v_ZHLD, is_causal=True)
        q_bZHFD = self._folds(q_ZHLD)
        k_bZHGD, v_bZHGD = (self._seen_by_folds(x_ZHLD) for x_ZHLD in (k_ZHLD, v_ZHLD))
        parts = []
        for first, stop in ((0, 1), (1, 2), (2, max(2, len(q_bZHFD)))):  # one mask each
            q, k, v = (x[first:stop].flatten(0, 1) for x in (q_bZHFD, k_bZHGD, v_bZHGD))
            if len(q):
                mask = self.layers.window_mask(first)[None, None]
                parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask))
        out_bZHFD = torch.cat(parts).view_as(q_bZHFD)
        return out_bZHFD.movedim(0, 2).flatten(2, 3)[:, :, :length]

    def _folds(self, x_ZHLD: Tensor) -> Tensor:
        """[b, Z, H, F, D], the last fold padded with zeros."""
        sequences, heads, length, dim = x_ZHLD.shape
        padded = pad(x_ZHLD, (0, 0, 0, -length % self.layers.fold))
        return padded.view(sequences, heads, -1, self.layers.fold, dim).movedim(2, 0)

    def _seen_by_folds(self, x_ZHLD: Tensor) -> Tensor:
        """Keys or values that a fold may see, [b, Z, H, 2 F + S, D]: fold before, fold, sinks."""
        x_bZHFD = self._folds(x_ZHLD)
        before_bZHFD = torch.cat([torch.zeros_like(x_bZHFD[:1]), x_bZHFD[:-1]])
        slots = self.layers.sink_slots
        sinks_ZHSD = pad(x_ZHLD[:, :, :slots], (0, 0, 0, max(slots - x_ZHLD.shape[2], 0)))
        sinks_bZHSD = sinks_ZHSD.expand(len(x_bZHFD), -1, -1, -1, -1)
        return torch.cat([before_bZHFD, x_bZHFD, sinks_bZHSD], dim=3)

    def _selected(self, layer: int, q_pre_THD: Tensor, k_pre_TND: Tensor) -> Tensor | None:
        """Tokens that retrieval heads attend from response rows, bool [Z, H, R, L]; None: all."""
        indexer, heads = self.layers.indexers[layer], self.layers.heads[layer]
        length = len(q_pre_THD) // self.sequences
        if indexer is None or length == self.prompt or length < self.layers.sparse.dense_below:
            return None
        k_TXI = project_index(k_pre_TND, indexer.k_proj_HID, heads.index_head_X)
        k_ZHLI = self._by_sequence(k_TXI).float()[:, heads.index_row_H]
        rows_ZRHD = self._by_sequence(q_pre_THD).transpose(1, 2)[:, self.prompt :]
        q_THI = project_index(rows_ZRHD.flatten(0, 1), indexer.q_proj_HID, heads.far_H)
        q_ZHRI = self._by_sequence(q_THI).float()
        positions_R = torch.arange(self.prompt, length, device=k_ZHLI.device)
        step = max(1, MAX_SCORES // (k_ZHLI[..., 0].numel()))
        return torch.cat(
            [
                self._select_rows(layer, q_ZHRI[:, :, i : i + step], k_ZHLI, positions_R[i:][:step])
                for i in range(0, len(positions_R), step)
            ],
            dim=2,
        )

    def _select_rows(
        self, layer: int, q_ZHRI: Tensor, k_ZHLI: Tensor, positions_R: Tensor
    ) -> Tensor:
        """The same for some rows."""
        sparse, block = self.layers.sparse, self.layers.sparse.block_tokens
        length = k_ZHLI.shape[2]
        width = length + -length % block
        past_RW = torch.arange(width, device=k_ZHLI.device) <= positions_R[:, None]
        scores_ZHRW = pad(q_ZHRI @ k_ZHLI.transpose(2, 3), (0, width - length))
        scores_ZHRW = scores_ZHRW.masked_fill_(~past_RW, float("-inf"))
        mass_ZHRB = block_log_mass(scores_ZHRW, block)
        indexer = self.layers.indexers[layer]
        if indexer is not None and indexer.age_bias_HA is not None:
            bias_RHB = age_bias(indexer.age_bias_HA, positions_R + 1, width // block, block)
            mass_ZHRB = mass_ZHRB + bias_RHB.transpose(0, 1)
        contexts_Q = (positions_R + 1).repeat(self.sequences)  # rows of all sequences in a row
        top_p_QH = self.layers.heads[layer].top_p_H.expand(len(contexts_Q), -1)
        top_p_QH = top_p_QH.masked_fill((contexts_Q < sparse.dense_below)[:, None], 1.0)
        mass_QHB = mass_ZHRB.transpose(1, 2).flatten(0, 1)
        mask_QHB = select_blocks(mass_QHB, top_p_QH, contexts_Q, block)
        mask_ZHRB = self._by_sequence(mask_QHB)
        seen_ZHRW = mask_ZHRB.repeat_interleave(block, dim=-1) & past_RW
        return seen_ZHRW[..., :length]
