"""One sequence through the serving path: its paged cache, its prefill rule, its decode rule.

What is measured here is what the server computes. Several decode rows run in one step (teacher
forcing), as the engine replays generated tokens.

Shapes: T tokens of a step, E hidden size, H retrieval heads of a layer, B block-table width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from engine.model.attention import AttentionLayers, PagedAttention
from engine.model.batch_tensors import AttentionMetadata
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder, Indexer
from engine.model.kv_cache import KVCache


class CachedSequence:
    """A sequence of up to `capacity` tokens that may be cut back and continued differently."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        indexers: Sequence[Indexer | None],
        capacity: int,
        chunk_tokens: int = 2048,
    ) -> None:
        """
        Args:
            decoder: the weights.
            config: the head roles, which may be other ones than the decoder came with.
            indexers: per layer, as the config asks for.
            capacity: tokens; memory is that of a dense cache of this length at most.
            chunk_tokens: tokens of one prefill step.
        """
        parameter = next(decoder.parameters())
        self.length = 0
        self.attended: list[int] = []  # tokens, per decode row and retrieval head that selected
        self.contexts: list[int] = []  # context length of each of these
        self._decoder = decoder
        self._chunk = chunk_tokens
        self._device = parameter.device
        self._block = 64 if config.sparse is None else config.sparse.block_tokens
        pages = -(-capacity // self._block)
        cache = KVCache(
            config,
            full_pages=pages,
            window_pages=pages,
            block_tokens=self._block,
            device=self._device,
            dtype=parameter.dtype,
        )
        self._layers = AttentionLayers(config, cache, indexers, self._device)
        self._table_B = torch.arange(1, pages + 1, device=self._device)

    def prefill(self, ids: Sequence[int], *, dense: bool = False) -> Tensor:
        """Append prompt tokens; hidden states [T, E] of the last chunk.

        Args:
            dense: local heads see the whole prompt too, so that its keys and values are those of
                the dense model and what decoding loses can be told from what the prompt lost.
        """
        assert ids
        layers = self._layers
        if dense:
            layers = copy(layers)
            layers.window = len(self._table_B) * self._block  # the capacity
        hidden_TE = torch.empty(0)
        for start in range(0, len(ids), self._chunk):
            hidden_TE = self._step(ids[start : start + self._chunk], layers, decode=False)
        return hidden_TE

    def decode(self, ids: Sequence[int]) -> Tensor:
        """Append generated tokens, each a decode row; hidden states [T, E]."""
        return self._step(ids, self._layers, decode=True)

    def cut(self, length: int) -> None:
        """Forget everything past the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    @torch.no_grad()
    def _step(self, ids: Sequence[int], layers: AttentionLayers, *, decode: bool) -> Tensor:
        attention = PagedAttention(layers, self._metadata(ids, decode))
        metadata = attention.metadata
        hidden_TE: Tensor = self._decoder(metadata.token_ids_T, metadata.positions_T, attention)
        self.length += len(ids)
        for attended_RH in attention.attended.values():
            selected = attended_RH > 0
            self.attended += attended_RH[selected].tolist()
            contexts_RH = metadata.decode_lens_R[:, None].expand_as(attended_RH)
            self.contexts += contexts_RH[selected].tolist()
        return hidden_TE

    def _metadata(self, ids: Sequence[int], decode: bool) -> AttentionMetadata:
        start, stop = self.length, self.length + len(ids)
        blocks = -(-stop // self._block)
        assert blocks <= len(self._table_B), "capacity exceeded"
        positions_T = torch.arange(start, stop, device=self._device)
        slots_T = positions_T + self._block  # page of block b is b + 1
        rows = len(ids) if decode else 0
        decode_RB = self._table_B[:blocks].expand(rows, -1)
        prefill_SB = self._table_B[None, :blocks] if not decode else decode_RB[:0]
        none = positions_T[:0]
        return AttentionMetadata(
            token_ids_T=torch.tensor(ids, dtype=torch.int64, device=self._device),
            positions_T=positions_T,
            full_slots_T=slots_T,
            window_slots_T=slots_T,
            decode_full_RB=decode_RB,
            decode_window_RB=decode_RB,
            decode_lens_R=positions_T[:rows] + 1,
            top_p_R=torch.full((rows,), float("nan"), device=self._device),
            prefill_full_SB=prefill_SB,
            prefill_window_SB=prefill_SB,
            prefill_starts=torch.tensor([0] if decode else [0, len(ids)], device=self._device),
            prefill_lens_S=none if decode else positions_T[-1:] + 1,
        )
