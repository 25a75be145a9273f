"""One sequence through the serving path: its paged cache, its prefill rule, its decode rule.

What is measured here is what the server computes. Several decode rows run in one step (teacher
forcing), as the engine replays generated tokens.

Shapes: T tokens of a step, E hidden size, H retrieval heads of a layer, B block-table width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import accumulate

import torch
from torch import Tensor

from conversion.chunk_sizes import chunk_sizes
from engine.model.attention import PagedAttention
from engine.model.attention_layers import AttentionLayers, BlockSelection, PrefillMode
from engine.model.batch_tensors import AttentionMetadata
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder, Indexer
from engine.model.kv_bytes import IndexDtype
from engine.model.kv_cache import KVCache
from kernels.prefill_sparse import DENSE_TAIL

BRANCH_PAGES = 64  # for the branches of one step, at least


class CachedSequence:
    """A sequence of up to `capacity` tokens that may be cut back and continued differently."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        indexers: Sequence[Indexer | None],
        capacity: int,
        chunk_tokens: int | None = None,
        branch_tokens: int = 0,
        selections: Sequence[BlockSelection] | None = None,
        prefill_attention: PrefillMode = "dense",
        index_dtype: IndexDtype = "auto",
    ) -> None:
        """
        Args:
            decoder: the weights.
            config: the head roles, which may be other ones than the decoder came with.
            indexers: per layer, as the config asks for.
            capacity: tokens; memory is that of a dense cache of this length at most.
            chunk_tokens: tokens of one prefill step; None: as suits the device.
            branch_tokens: longest continuation given to `branch`, 0: there is none.
            selections: per layer, how retrieval heads select; None: as in serving.
            prefill_attention: what retrieval heads read for prompt tokens.
            index_dtype: of the index keys in the cache.
        """
        parameter = next(decoder.parameters())
        self.length = 0
        self._dense_from = 0  # position from which prompt tokens read everything
        self._decoder = decoder
        self._device = parameter.device
        self._chunk = chunk_tokens or chunk_sizes(self._device).prompt_tokens
        self._counts: list[tuple[int, int]] = []  # attended tokens, context length
        self._uncounted: list[Tensor] = []  # the same [2, X] of the latest steps, on the device
        self._block = 64 if config.sparse is None else config.sparse.block_tokens
        pages = -(-capacity // self._block)
        # A continuation that starts inside a page may need one page more.
        spare = max(BRANCH_PAGES, -(-branch_tokens // self._block) + 1) if branch_tokens else 0
        cache = KVCache(
            config,
            full_pages=pages + spare,
            window_pages=pages + spare,
            block_tokens=self._block,
            device=self._device,
            dtype=parameter.dtype,
            index_dtype=index_dtype,
        )
        self._layers = AttentionLayers(
            config, cache, indexers, self._device, selections, prefill_attention
        )
        self._table_B = torch.arange(1, pages + 1, device=self._device)
        self._spare = range(pages + 1, pages + 1 + spare)

    @property
    def attended(self) -> list[int]:
        """Tokens, per decode row and retrieval head that selected."""
        return [attended for attended, _ in self._counted()]

    @property
    def contexts(self) -> list[int]:
        """Context length of each of `attended`."""
        return [context for _, context in self._counted()]

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
            layers.prefill_attention = "dense"
        self._dense_from = self.length + len(ids) - DENSE_TAIL
        hidden_TE = torch.empty(0)
        for start in range(0, len(ids), self._chunk):
            hidden_TE = self._append(ids[start : start + self._chunk], layers, decode=False)
        return hidden_TE

    def decode(self, ids: Sequence[int]) -> Tensor:
        """Append generated tokens, each a decode row; hidden states [T, E]."""
        return self._append(ids, self._layers, decode=True)

    def branch(self, continuations: Sequence[Sequence[int]], *, decode: bool) -> list[Tensor]:
        """Continue in several ways side by side: hidden states [T, E] of each. None is kept.

        Args:
            continuations: token ids, each at most `branch_tokens`.
            decode: they are generated tokens rather than prompt.
        """
        hidden: list[Tensor] = []
        while len(hidden) < len(continuations):
            group, tables_SB = self._branch_tables(continuations[len(hidden) :])
            lens = [len(ids) for ids in group]
            hidden_TE = self._step(group, tables_SB, self._layers, decode=decode)
            hidden += torch.split(hidden_TE, lens)
        return hidden

    def cut(self, length: int) -> None:
        """Forget everything past the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    def _append(self, ids: Sequence[int], layers: AttentionLayers, *, decode: bool) -> Tensor:
        blocks = -(-(self.length + len(ids)) // self._block)
        assert blocks <= len(self._table_B), "capacity exceeded"
        hidden_TE = self._step([ids], self._table_B[None, :blocks], layers, decode=decode)
        self.length += len(ids)
        return hidden_TE

    def _branch_tables(
        self, continuations: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Sequence[int]], Tensor]:
        """As many of the continuations as the spare pages hold, and their block tables [S, B].

        [0, shared) are the sequence's full pages, the others the branch's own, the first of which
        begins as a copy of the page that the sequence ends in.
        """
        shared, inside = divmod(self.length, self._block)
        counts = [-(-(inside + len(ids)) // self._block) for ids in continuations]
        ends = list(accumulate(counts))
        size = sum(end <= len(self._spare) for end in ends)
        assert size, "branch_tokens exceeded"
        own = [self._spare[end - count : end] for end, count in zip(ends, counts, strict=True)]
        own = own[:size]
        widest = max(counts[:size])
        own_SB = self._ints([[*pages, *[0] * (widest - len(pages))] for pages in own])
        if inside:
            self._copy_page(shared + 1, own_SB[:, 0])  # page of block b is b + 1
        shared_SB = self._table_B[:shared].expand(size, -1)
        return continuations[:size], torch.cat((shared_SB, own_SB), dim=1)

    def _copy_page(self, page: int, to_S: Tensor) -> None:
        """One page of every cache to others."""
        for layer in self._layers.caches:
            for cache in layer.full_tensors + layer.window_tensors:
                if cache.numel():
                    cache[to_S] = cache[page].clone()

    @torch.no_grad()
    def _step(
        self,
        parts: Sequence[Sequence[int]],
        tables_SB: Tensor,
        layers: AttentionLayers,
        *,
        decode: bool,
    ) -> Tensor:
        """Compute spans that follow the sequence, each by its own table: hidden states [T, E]."""
        attention = PagedAttention(layers, self._metadata(parts, tables_SB, decode))
        metadata = attention.metadata
        hidden_TE: Tensor = self._decoder(metadata.token_ids_T, metadata.positions_T, attention)
        counts = attention.attended.values()
        if counts:
            contexts = (metadata.decode_lens_R[:, None].expand_as(count_RH) for count_RH in counts)
            pairs = [torch.stack(pair).flatten(1) for pair in zip(counts, contexts, strict=True)]
            self._uncounted.append(torch.cat(pairs, dim=1))
        return hidden_TE

    def _counted(self) -> list[tuple[int, int]]:
        """Counts of all steps, brought to the host at once: each step would wait for its own."""
        if self._uncounted:
            attended, contexts = torch.cat(self._uncounted, dim=1).tolist()
            self._uncounted.clear()
            pairs = zip(attended, contexts, strict=True)
            self._counts += [pair for pair in pairs if pair[0] > 0]
        return self._counts

    def _metadata(
        self, parts: Sequence[Sequence[int]], tables_SB: Tensor, decode: bool
    ) -> AttentionMetadata:
        lens = [len(ids) for ids in parts]
        # One copy to the device for all three.
        ids_T, positions_T, span_T = self._ints(
            [
                [token for ids in parts for token in ids],
                [self.length + i for count in lens for i in range(count)],
                [span for span, count in enumerate(lens) for _ in range(count)],
            ]
        )
        pages_T = tables_SB[span_T, positions_T // self._block]
        slots_T = pages_T * self._block + positions_T % self._block
        rows = len(positions_T) if decode else 0
        # One span is a long replay: its rows share a view of the table.
        tables_RB = tables_SB.expand(rows, -1) if len(parts) == 1 else tables_SB[span_T[:rows]]
        spans = 0 if decode else len(parts)
        return AttentionMetadata(
            token_ids_T=ids_T,
            positions_T=positions_T,
            full_slots_T=slots_T,
            window_slots_T=slots_T,
            decode_full_RB=tables_RB,
            decode_window_RB=tables_RB,
            decode_lens_R=positions_T[:rows] + 1,
            top_p_R=torch.full((rows,), float("nan"), device=self._device),
            prefill_full_SB=tables_SB[:spans],
            prefill_window_SB=tables_SB[:spans],
            # On the host, where every layer reads them as numbers.
            prefill_starts=torch.tensor([0, *accumulate(lens[:spans])]),
            prefill_lens_S=torch.tensor([self.length + n for n in lens[:spans]], dtype=torch.int64),
            prefill_dense_from_S=torch.full((spans,), self._dense_from, device=self._device),
        )

    def _ints(self, values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
