"""Attention over one whole document with head roles, and a place to watch from.

Shapes: T tokens, H query heads, N KV heads, D head_dim, R sampled rows, K tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from kernels.prefill import prefill_dense, prefill_windowed

VIEW_BLOCK = 64  # tokens; any size does, there is one page table for the whole document


@dataclass(frozen=True, slots=True)
class LayerView:
    """What attention sees of one layer; `pre` is after QK-norm and before RoPE."""

    layer: int
    q_pre_THD: Tensor
    k_pre_TND: Tensor
    q_THD: Tensor
    k_TND: Tensor


class DocumentAttention:
    """Implements `engine.model.layers.Attention` for a document that is computed at once.

    Heads follow the prefill rule of `config.sparse` (all dense without it), by the ops that serve,
    so memory grows with the document's length and never with its square. Nothing is kept from layer
    to layer but what `watch` keeps.
    """

    def __init__(
        self, config: ModelConfig, watch: Callable[[LayerView], None], device: torch.device
    ) -> None:
        self._config = config
        self._watch = watch
        self._order = [_head_order(config, layer) for layer in range(config.num_layers)]
        # For all layers at once: a GPU would be waited for at every copy.
        self._order_LH = torch.tensor(self._order, device=device)

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        self._watch(LayerView(layer, q_pre_THD, k_pre_TND, q_THD, k_TND))
        sparse, scale = self._config.sparse, self._config.head_dim**-0.5
        view = _whole_document(k_TND, v_TND)
        kv_row_H = torch.tensor([head // self._config.group_size for head in self._order[layer]])
        far = len(kv_row_H) if sparse is None else len(sparse.retrieval_heads[layer])
        if far == len(kv_row_H):
            return prefill_dense(q_THD, kv_row_H, *view, scale)
        assert sparse is not None
        rule = (sparse.window_tokens, sparse.sink_tokens, scale)
        if far == 0:
            return prefill_windowed(q_THD, kv_row_H, *view, *rule)
        far_H, near_H = self._order_LH[layer, :far], self._order_LH[layer, far:]
        out_THD = torch.empty_like(q_THD)
        out_THD[:, far_H] = prefill_dense(q_THD[:, far_H], kv_row_H[:far], *view, scale)
        out_THD[:, near_H] = prefill_windowed(q_THD[:, near_H], kv_row_H[far:], *view, *rule)
        return out_THD


def _head_order(config: ModelConfig, layer: int) -> list[int]:
    """Query heads of a layer, retrieval heads first; without roles as they are."""
    heads = range(config.num_heads)
    far = () if config.sparse is None else config.sparse.retrieval_heads[layer]
    return [*sorted(far), *(head for head in heads if head not in far)]


def _whole_document(k_TND: Tensor, v_TND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Caches, block table, query starts and context length of one span that is all there is.

    The last two are on the host: they are read as numbers.
    """
    tokens, (k_cache, v_cache) = len(k_TND), (_pages(k_TND), _pages(v_TND))
    table_SB = torch.arange(len(k_cache), device=k_TND.device).unsqueeze(0)
    return k_cache, v_cache, table_SB, torch.tensor([0, tokens]), torch.tensor([tokens])


@torch.no_grad()
def watch_document(
    decoder: Decoder, config: ModelConfig, ids: list[int], watch: Callable[[LayerView], None]
) -> Tensor:
    """Run one document; `watch` sees every layer. Hidden states [T, E] after the final norm."""
    device = next(decoder.parameters()).device
    positions_T = torch.arange(len(ids), device=device)
    hidden_TE: Tensor = decoder(
        torch.tensor(ids, device=device), positions_T, DocumentAttention(config, watch, device)
    )
    return hidden_TE


def attention_rows(view: LayerView, head: int, rows_R: Tensor, group_size: int) -> Tensor:
    """Log-probabilities [R, T] of one head's dense attention from some positions, float32.

    Keys after the row's own position get -inf.
    """
    q_RD = view.q_THD[rows_R, head].float()
    k_TD = view.k_TND[:, head // group_size].float()
    scores_RT = q_RD @ k_TD.T * q_RD.shape[-1] ** -0.5
    return hide_future(scores_RT, rows_R).log_softmax(-1)


def hide_future(scores_RT: Tensor, rows_R: Tensor) -> Tensor:
    """The scores with -inf at keys past each row's position, in place."""
    keys_T = torch.arange(scores_RT.shape[1], device=scores_RT.device)
    return scores_RT.masked_fill_(keys_T > rows_R[:, None], float("-inf"))


def _pages(x_TND: Tensor) -> Tensor:
    """[T, N, D] as pages [P, N, K, D] in order, the last one padded with zeros."""
    tokens, kv_heads, dim = x_TND.shape
    padded = pad(x_TND, (0, 0, 0, 0, 0, -tokens % VIEW_BLOCK))
    return padded.view(-1, VIEW_BLOCK, kv_heads, dim).transpose(1, 2)
