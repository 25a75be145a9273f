"""The layer that decode attention is tried out on: small, ragged, the same on every host.

Rows of one token, of one past the end of a page, of whole pages, and of more blocks than a CTA of
the indexer has threads, which attention splits among many CTAs; one that pads. Pages that no row
may read hold NaN, and so does what lies behind the end of a context.

Shapes as in `kernels.cuda_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from kernels.block_age import AGE_RANGES
from kernels.decode_inputs import PagedPool, Selection, WindowRule
from kernels.head_tiles import HeadRole
from kernels.paged_kv import quantise_index_keys
from kernels.trial import Random, random_numbers

LONG = 300  # blocks
LONG_ROW = 3  # which has them
LONGEST = 1024  # blocks, where a window of many small pages is to end inside a context
SHARED_PAGES = 24  # that contexts are made of

Given = TypeVar("Given", PagedPool, Selection)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeKind:
    """Decode attention of a model.

    group: query heads of a KV head.
    has_local: some heads see the last `window` tokens and the first `sinks` only.
    index_dim: None lets retrieval heads see the whole context.
    index_dtype: of index keys, `dtype` or int8.
    has_age_bias: the index has a bias by age.
    """

    dtype: torch.dtype
    head_dim: int
    group: int
    block_tokens: int
    has_local: bool
    window: int = 0
    sinks: int = 0
    index_dim: int | None = None
    index_dtype: torch.dtype = torch.float32
    has_age_bias: bool = False


@dataclass(frozen=True, slots=True)
class TrialLayer:
    """What `cuda_decode.attend` takes, on one device."""

    roles: list[HeadRole]
    q_RHD: Tensor
    full: PagedPool
    window: PagedPool
    lens_R: Tensor
    rule: WindowRule
    selection: Selection | None

    @classmethod
    def make(cls, kind: DecodeKind) -> TrialLayer:
        """On the CPU."""
        random, roles = random_numbers(kind.dtype, seed=1), _roles(kind)
        lens_R, tables_RB = _tables(kind)
        first_R1 = ((lens_R - kind.window).clamp(min=0) // kind.block_tokens)[:, None]
        start_B = torch.arange(tables_RB.shape[1]) * kind.block_tokens
        slid_out_RB = (start_B < first_R1 * kind.block_tokens) & (start_B >= kind.sinks)

        def pool(name: str, tables_RB: Tensor) -> PagedPool:
            heads = 1 + max((role.kv_row for role in roles if role.pool == name), default=0)
            k_cache, v_cache = (_cache(kind, random, lens_R, heads, kind.head_dim) for _ in "kv")
            return PagedPool(k_cache, v_cache, tables_RB)

        return cls(
            roles,
            random(len(lens_R), len(roles), kind.head_dim),
            pool("full", tables_RB),
            pool("window", tables_RB.masked_fill(slid_out_RB, 0)),
            lens_R,
            WindowRule(kind.window, kind.sinks),
            _selection(kind, random, roles, lens_R),
        )

    @property
    def block_tokens(self) -> int:
        return self.full.k_cache.shape[2]

    @property
    def scale(self) -> float:
        return float(self.q_RHD.shape[2] ** -0.5)

    def of_row(self, row: int) -> TrialLayer:
        """That row alone: a single one is for clusters, which are other kernels."""
        own, selection = slice(row, row + 1), self.selection
        full, window = (
            replace(pool, tables_RB=pool.tables_RB[own]) for pool in (self.full, self.window)
        )
        if selection is not None:
            top_p_R = selection.own_top_p_R
            selection = replace(
                selection,
                qi_RSI=selection.qi_RSI[own],
                own_top_p_R=None if top_p_R is None else top_p_R[own],
            )
        q_RHD, lens_R = self.q_RHD[own], self.lens_R[own]
        given = replace(self, q_RHD=q_RHD, lens_R=lens_R, selection=selection)
        return replace(given, full=full, window=window)

    def to(self, device: torch.device) -> TrialLayer:
        return replace(
            self,
            q_RHD=self.q_RHD.to(device),
            full=_moved(self.full, device),
            window=_moved(self.window, device),
            lens_R=self.lens_R.to(device),
            selection=None if self.selection is None else _moved(self.selection, device),
        )


def _roles(kind: DecodeKind) -> list[HeadRole]:
    """Two KV heads of the full pool, one retrieval head in the first and half of the second's; and
    one KV head of the window pool. Without local heads the first two, all retrieval."""
    if not kind.has_local:
        return [HeadRole("full", kv, retrieval=True) for kv in (0, 1) for _ in range(kind.group)]
    retrieval = [0, *range(kind.group + kind.group // 2, 2 * kind.group)]
    roles = []
    for head in range(2 * kind.group):
        selected = None
        if head in retrieval and kind.index_dim is not None:
            selected = retrieval.index(head)
        roles.append(HeadRole("full", head // kind.group, head in retrieval, selected))
    return roles + [HeadRole("window", 0, retrieval=False)] * kind.group


def _tables(kind: DecodeKind) -> tuple[Tensor, Tensor]:
    """Contexts [R], and tables of pages that rows share but for the last one of each."""
    block, generator = kind.block_tokens, torch.Generator().manual_seed(2)
    blocks = min(max(LONG, kind.window // block + 3), LONGEST)
    lens_R = torch.tensor([1, block + 1, 3 * block, blocks * block - 3, 0])
    first, shape = 1 + len(lens_R), (len(lens_R), blocks + 1)
    tables_RB = torch.randint(first, first + SHARED_PAGES, shape, generator=generator)
    tables_RB.scatter_(1, (lens_R - 1).clamp(min=0)[:, None] // block, _own_pages(lens_R)[:, None])
    tables_RB[torch.arange(shape[1]) * block >= lens_R[:, None]] = 0
    return lens_R, tables_RB


def _own_pages(lens_R: Tensor) -> Tensor:
    """The last page of each row, behind the null page."""
    return 1 + torch.arange(len(lens_R))


def _cache(kind: DecodeKind, random: Random, lens_R: Tensor, heads: int, size: int) -> Tensor:
    """Pages [P, heads, K, size]; NaN in the null page and past the end of contexts."""
    block = kind.block_tokens
    values = random(1 + len(lens_R) + SHARED_PAGES, heads, block, size)
    values[0] = torch.nan
    for page, length in zip(_own_pages(lens_R).tolist(), lens_R.tolist(), strict=True):
        values[page, :, (length - 1) % block + 1 :] = torch.nan
    return values


def _selection(
    kind: DecodeKind, random: Random, roles: list[HeadRole], lens_R: Tensor
) -> Selection | None:
    """One row has a share of its own; the shortest contexts are below the threshold."""
    heads = sum(role.selected is not None for role in roles)
    if kind.index_dim is None or heads == 0:
        return None
    keys = _cache(kind, random, lens_R, heads, kind.index_dim)
    scales = None
    if kind.index_dtype == torch.int8:
        shape, stored = keys.shape, ~keys.isnan()
        keys, scales = quantise_index_keys(keys.flatten(0, 1))
        keys, scales = keys.view(shape).where(stored, 127), scales.view(shape[:3])
    age_bias_SA = None
    if kind.has_age_bias:
        age_bias_SA = 2 * random_numbers(torch.float32, seed=3)(heads, AGE_RANGES)
    own_top_p_R = torch.full((len(lens_R),), torch.nan)
    own_top_p_R[2] = 0.1
    return Selection(
        # Scores spread over a few nats, so that a few blocks hold most of the mass.
        qi_RSI=random(len(lens_R), heads, kind.index_dim) * 0.4,
        index_row_S=torch.arange(heads).flip(0),
        index_cache=keys,
        top_p_S=torch.full((heads,), 0.5),
        own_top_p_R=own_top_p_R,
        dense_below=kind.block_tokens + 2,
        index_scales=scales,
        age_bias_SA=age_bias_SA,
    )


def _moved(given: Given, device: torch.device) -> Given:
    """The same with its tensors on a device."""
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(given, **tensors)  # type: ignore[arg-type]  # only the fields of tensors
