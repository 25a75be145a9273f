"""What sequences must get, from one n x n mask per head; slow, and written from the design.

Legend: n tokens of a sequence, H query heads, N KV heads, D head_dim, I index_dim, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.decoder import Indexer
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import IndexDtype, block_tokens_of
from kernels.reference import quantise_index_keys, select_blocks


@dataclass
class PagedSequence:
    """Random tensors of one sequence in every layer, and where its pages lie."""

    q_pre: Tensor  # [layers, n, H, D]; the same shapes below
    k_pre: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    prompt: int
    top_p: float | None = None
    computed: int = 0
    epoch: int = 0
    full_blocks: list[int] = field(default_factory=list)
    window_blocks: list[int] = field(default_factory=list)


class NaiveAttention:
    """Every layer of a model whose queries, keys and values are given."""

    def __init__(
        self, model: ModelConfig, indexers: Sequence[Indexer | None], index_dtype: IndexDtype
    ) -> None:
        self._model = model
        self._indexers = indexers
        self._index_dtype = index_dtype
        self._block = block_tokens_of(model)
        self._heads = model_heads(model)

    def outputs(self, sequence: PagedSequence) -> Tensor:
        """[layers, n, H, D]."""
        layers = range(self._model.num_layers)
        return torch.stack([self._layer(sequence, layer) for layer in layers])

    def _layer(self, sequence: PagedSequence, layer: int) -> Tensor:
        model = self._model
        heads = []
        for head in range(model.num_heads):
            kv = head // model.group_size
            q_nD, k_nD = sequence.q[layer, :, head].double(), sequence.k[layer, :, kv].double()
            scores_nn = q_nD @ k_nD.T * model.head_dim**-0.5
            scores_nn[~self._allowed(sequence, layer, head)] = -torch.inf
            heads.append(scores_nn.softmax(-1) @ sequence.v[layer, :, kv].double())
        return torch.stack(heads, dim=1).float()

    def _allowed(self, sequence: PagedSequence, layer: int, head: int) -> Tensor:
        """Which key (column) each query (row) of one head sees: design section 5."""
        n, sparse = sequence.q.shape[1], self._model.sparse
        m, j = torch.arange(n)[:, None], torch.arange(n)
        allowed_nn = j <= m
        if sparse is None:
            return allowed_nn
        if head not in sparse.retrieval_heads[layer]:
            return allowed_nn & ((m - j < sparse.window_tokens) | (j < sparse.sink_tokens))
        if sparse.index_dim is not None:
            for query in range(sequence.prompt, n):
                if query + 1 >= sparse.dense_below:
                    kept_B = self._selected(sequence, layer, head, query)
                    allowed_nn[query] &= kept_B.repeat_interleave(self._block)[:n]
        return allowed_nn

    def _selected(self, sequence: PagedSequence, layer: int, head: int, query: int) -> Tensor:
        sparse, indexer = self._model.sparse, self._indexers[layer]
        assert sparse is not None
        assert indexer is not None
        row = sparse.retrieval_heads[layer].index(head)
        kv = head // self._model.group_size
        key_row = self._heads[layer].full_kv.index(kv) if sparse.index_scope == "kv_head" else row
        qi_I = indexer.q_proj_HID[row] @ sequence.q_pre[layer, query, head]
        ki_nI = sequence.k_pre[layer, : query + 1, kv] @ indexer.k_proj_HID[key_row].T
        if self._index_dtype == "int8":
            steps_nHI, scales_nH = quantise_index_keys(ki_nI[:, None])
            ki_nI = steps_nHI[:, 0].float() * scales_nH.float()
        blocks = -(-sequence.q.shape[1] // self._block)
        log_mass_B = torch.full((blocks,), -torch.inf)
        for block, scores in enumerate(torch.split(ki_nI @ qi_I, self._block)):
            log_mass_B[block] = scores.logsumexp(0)
            if indexer.age_bias_HA is not None:
                age = query // self._block - block
                log_mass_B[block] += indexer.age_bias_HA[row, age.bit_length()]
        top_p = sequence.top_p or sparse.top_p[layer][row]
        mask_11B = select_blocks(
            log_mass_B[None, None],
            torch.tensor([[top_p]], dtype=torch.float64),
            torch.tensor([query + 1]),
            self._block,
        )
        return mask_11B[0, 0]
