"""Fit the indexer of every retrieval head on text, without gradient steps.

Three passes over documents that the model reads as it will when served (local heads windowed):

1. moments of queries and keys (`conversion.closed_form`); a query counts by the attention it pays
   further back than a window's length or NEAR_TOKENS, whichever is less, because that is what
   selection is for;
2. on other documents, each horizon of HORIZONS is tried at every temperature of TEMPERATURES. The
   temperature taken is the sharpest that keeps `top_p` of the true attention on average, at any
   position of the text as well as at the tokens of a repeated needle, so that top_p means what it
   says; the horizon taken is the one that then needs the fewest blocks;
3. on further documents, `IndexQuality` of the result.

Memory: sampled rows times document length, one head at a time.
Shapes: R sampled rows, T tokens, D head_dim, I index_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

from conversion.closed_form import Moments, factorise, mean_rotation
from conversion.document_attention import (
    LayerView,
    attention_rows,
    hide_future,
    watch_document,
)
from conversion.index_quality import IndexQuality, measure
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder, Indexer
from engine.model.head_layout import layer_heads
from engine.model.rope import rope_frequencies

SAMPLED_ROWS = 128  # query positions per document and pass
NEAR_TOKENS = 256
HORIZONS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the documents' length
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-6, 7))  # 0.35 to 2.8

Documents = Sequence[list[int]]
Advance = Callable[[], None]
_Candidate = tuple[float, list[tuple[Tensor, Tensor]]]  # horizon; W_Q and W_K of every group


@dataclass(slots=True)
class IndexGroup:
    """Query heads of one layer that share one key projection, and what is learnt of them."""

    layer: int
    kv_head: int
    heads: tuple[int, ...]
    query_moments: list[Moments]
    key_moments: Moments
    w_q_GID: Tensor = field(default_factory=lambda: torch.empty(0))
    w_k_ID: Tensor = field(default_factory=lambda: torch.empty(0))

    def scores(self, place: int, view: LayerView, rows_R: Tensor) -> Tensor:
        """Index scores [R, T] of the head at `place`, -inf past each row's position."""
        device = view.q_pre_THD.device
        w_q_ID, w_k_ID = self.w_q_GID[place].float().to(device), self.w_k_ID.float().to(device)
        q_RI = view.q_pre_THD[rows_R, self.heads[place]].float() @ w_q_ID.T
        k_TI = view.k_pre_TND[:, self.kv_head].float() @ w_k_ID.T
        return hide_future(q_RI @ k_TI.T, rows_R)


@dataclass(frozen=True, slots=True)
class HeadQuality:
    """One line of the report."""

    layer: int
    head: int
    horizon_tokens: float
    temperature: float
    anywhere: IndexQuality  # queries at any position of the text
    needle: IndexQuality  # queries at the repeated needle, where only far attention answers


def index_groups(config: ModelConfig) -> list[IndexGroup]:
    """Groups in the order of the rows of k_proj: per retrieval head, or per full KV head."""
    assert config.sparse is not None
    assert config.sparse.index_dim is not None
    groups = []
    for layer in range(config.num_layers):
        heads = layer_heads(config, layer)
        sets: list[tuple[int, ...]] = [(head,) for head in heads.retrieval]
        if config.sparse.index_scope == "kv_head":
            size = config.group_size
            sets = [tuple(h for h in heads.retrieval if h // size == kv) for kv in heads.full_kv]
        for members in sets:
            moments = [Moments.empty(config.head_dim) for _ in range(len(members) + 1)]
            kv = members[0] // config.group_size
            groups.append(IndexGroup(layer, kv, members, moments[1:], moments[0]))
    return groups


class IndexerFit:
    """The three passes over one model with chosen heads."""

    def __init__(self, decoder: Decoder, config: ModelConfig, seed: int = 0) -> None:
        """`config` is the model's with the sparse section that is being made."""
        assert config.sparse is not None
        assert config.sparse.index_dim is not None
        self.config = config
        self.sparse = config.sparse
        self.index_dim = config.sparse.index_dim
        self.groups = index_groups(config)
        self._top_p = {
            (layer, head): p
            for layer in range(config.num_layers)
            for head, p in zip(
                self.sparse.retrieval_heads[layer], self.sparse.top_p[layer], strict=True
            )
        }
        self._decoder = decoder
        self._device = next(decoder.parameters()).device
        self._seed = seed
        self._chosen: dict[tuple[int, int], tuple[float, float]] = {}

    def fit(
        self, documents: Documents, trial: Documents, needle_tokens: int, advance: Advance
    ) -> None:
        """Passes 1 and 2; `advance` is called after each document.

        The documents of `trial` end with a repeated needle of `needle_tokens` tokens.
        """
        for number, ids in enumerate(documents):
            rows_R = self._rows(len(ids), number)
            self._watch(ids, partial(self._add_moments, rows_R=rows_R))
            advance()
        candidates = self._candidates(max(len(ids) for ids in documents))
        tallies = [_Tally(len(candidates), len(group.heads)) for group in self.groups]
        for number, ids in enumerate(trial):
            kinds = self._row_kinds(len(ids), needle_tokens, number)
            watch = partial(self._try, kinds=kinds, candidates=candidates, tallies=tallies)
            self._watch(ids, watch)
            advance()
        for place, (group, tally) in enumerate(zip(self.groups, tallies, strict=True)):
            wanted = [self._top_p[group.layer, head] for head in group.heads]
            best, temperatures = tally.choose(wanted)
            horizon, fitted = candidates[best]
            w_q_GID, group.w_k_ID = fitted[place]
            group.w_q_GID = w_q_GID * torch.tensor(temperatures).double().view(-1, 1, 1)
            for head, temperature in zip(group.heads, temperatures, strict=True):
                self._chosen[group.layer, head] = (horizon, temperature)

    def quality(
        self, documents: Documents, needle_tokens: int, advance: Advance
    ) -> list[HeadQuality]:
        """Pass 3, on documents that end with a repeated needle; lines in head order."""
        found: dict[tuple[int, int], list[tuple[IndexQuality, IndexQuality]]] = {}
        for number, ids in enumerate(documents):
            kinds = self._row_kinds(len(ids), needle_tokens, number)

            def watch(view: LayerView, kinds: tuple[Tensor, Tensor] = kinds) -> None:
                for group in self._groups_of(view):
                    for place, head in enumerate(group.heads):
                        anywhere, needle = (
                            self._measure(group, place, view, rows_R) for rows_R in kinds
                        )
                        found.setdefault((group.layer, head), []).append((anywhere, needle))

            self._watch(ids, watch)
            advance()
        return [
            HeadQuality(
                *key,
                *self._chosen[key],
                _mean([anywhere for anywhere, _ in pairs]),
                _mean([needle for _, needle in pairs]),
            )
            for key, pairs in sorted(found.items())
        ]

    def indexers(self) -> list[Indexer | None]:
        """Per layer, float32, in the layout of indexer.safetensors."""
        indexers: list[Indexer | None] = []
        for layer in range(self.config.num_layers):
            groups = [group for group in self.groups if group.layer == layer]
            indexers.append(
                Indexer(
                    q_proj_HID=torch.cat([group.w_q_GID for group in groups]).float(),
                    k_proj_HID=torch.stack([group.w_k_ID for group in groups]).float(),
                )
                if groups
                else None
            )
        return indexers

    def _watch(self, ids: list[int], watch: Callable[[LayerView], None]) -> None:
        watch_document(self._decoder, self.config, ids, watch)

    def _rows(self, tokens: int, number: int) -> Tensor:
        """Positions in the last three quarters, where there is something far to attend to."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        first = tokens // 4
        chosen = torch.randperm(tokens - first, generator=generator)[:SAMPLED_ROWS]
        return (chosen.sort().values + first).to(self._device)

    def _row_kinds(self, tokens: int, needle: int, number: int) -> tuple[Tensor, Tensor]:
        """Positions in the text, and those of the needle at its end."""
        needle_R = torch.arange(tokens - needle, tokens, device=self._device)
        return self._rows(tokens - needle, number), needle_R

    def _groups_of(self, view: LayerView) -> list[IndexGroup]:
        return [group for group in self.groups if group.layer == view.layer]

    def _add_moments(self, view: LayerView, rows_R: Tensor) -> None:
        near = min(NEAR_TOKENS, self.sparse.window_tokens)
        keys_T = torch.arange(len(view.q_THD), device=self._device)
        far_RT = (keys_T < (rows_R - near)[:, None]) & (keys_T >= self.sparse.block_tokens)
        for group in self._groups_of(view):
            group.key_moments.add(view.k_pre_TND[:, group.kv_head])
            for head, moments in zip(group.heads, group.query_moments, strict=True):
                log_RT = attention_rows(view, head, rows_R, self.config.group_size)
                weight_R = (log_RT.exp() * far_RT).sum(-1) + 1e-6  # never all zero
                moments.add(view.q_pre_THD[rows_R, head], weight_R)

    def _candidates(self, length: int) -> list[_Candidate]:
        """Per horizon in tokens: W_Q and W_K of every group at temperature 1."""
        config = self.config
        frequencies, _ = rope_frequencies(config.rope, config.head_dim)
        candidates = []
        for share in HORIZONS:
            target_DD = mean_rotation(frequencies, share * length) * config.head_dim**-0.5
            fitted = [
                factorise(
                    torch.stack([moments.second for moments in group.query_moments]),
                    group.key_moments.covariance,
                    target_DD,
                    self.index_dim,
                )
                for group in self.groups
            ]
            candidates.append((share * length, fitted))
        return candidates

    def _try(
        self,
        view: LayerView,
        kinds: tuple[Tensor, Tensor],
        candidates: list[_Candidate],
        tallies: list[_Tally],
    ) -> None:
        """Tally every candidate at every temperature on the sampled rows of one layer."""
        block = self.sparse.block_tokens
        for number, group in enumerate(self.groups):
            if group.layer != view.layer:
                continue
            for (kind, rows_R), place in product(enumerate(kinds), range(len(group.heads))):
                head = group.heads[place]
                log_RT = attention_rows(view, head, rows_R, self.config.group_size)
                top_p = self._top_p[group.layer, head]
                for candidate, (_, fitted) in enumerate(candidates):
                    group.w_q_GID, group.w_k_ID = fitted[number]
                    scores_RT = group.scores(place, view, rows_R)
                    for step, temperature in enumerate(TEMPERATURES):
                        quality = measure(log_RT, scores_RT * temperature, rows_R, top_p, block)
                        tallies[number].add((kind, candidate, place, step), quality)

    def _measure(
        self, group: IndexGroup, place: int, view: LayerView, rows_R: Tensor
    ) -> IndexQuality:
        head = group.heads[place]
        return measure(
            attention_rows(view, head, rows_R, self.config.group_size),
            group.scores(place, view, rows_R),
            rows_R,
            self._top_p[group.layer, head],
            self.sparse.block_tokens,
        )


class _Tally:
    """Kept mass and blocks of one group, summed over documents.

    By kind of rows (text, needle), candidate, head of the group, and temperature.
    """

    def __init__(self, candidates: int, heads: int) -> None:
        shape = (2, candidates, heads, len(TEMPERATURES))
        self.kept = torch.zeros(shape, dtype=torch.float64)
        self.blocks = torch.zeros(shape, dtype=torch.float64)
        self.count = torch.zeros(shape, dtype=torch.float64)

    def add(self, place: tuple[int, int, int, int], quality: IndexQuality) -> None:
        self.kept[place] += quality.kept_mass
        self.blocks[place] += quality.blocks
        self.count[place] += 1

    def choose(self, wanted: list[float]) -> tuple[int, list[float]]:
        """The candidate of fewest blocks, and each head's sharpest temperature that keeps enough.

        A head that keeps too little at every temperature gets the flattest, which keeps most.
        """
        kept = (self.kept / self.count).amin(0)  # the worse of the two kinds of rows
        blocks = (self.blocks / self.count).mean(0)
        enough = kept >= torch.tensor(wanted, dtype=torch.float64)[:, None]
        steps = torch.arange(len(TEMPERATURES))
        step = torch.where(enough, steps, 0).amax(-1, keepdim=True)  # [candidates, heads, 1]
        cost = blocks.gather(-1, step).sum((1, 2))
        best = int(cost.argmin())
        return best, [TEMPERATURES[index] for index in step[best, :, 0].tolist()]


def _mean(qualities: list[IndexQuality]) -> IndexQuality:
    count = len(qualities)
    return IndexQuality(
        kept_mass=sum(q.kept_mass for q in qualities) / count,
        blocks=sum(q.blocks for q in qualities) / count,
        teacher_blocks=sum(q.teacher_blocks for q in qualities) / count,
        context_blocks=sum(q.context_blocks for q in qualities) / count,
    )
