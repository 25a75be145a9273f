"""From a batch of integers to the tensors that attention reads.

Shapes: T tokens of the step, R decode rows, S prefill spans, B block-table width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from engine.batch import Batch, Span
from engine.request import Request
from engine.transfer import upload
from kernels.prefill_sparse import DENSE_TAIL


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a step stand and where their KV lies. Decode rows come first.

    All tensors are int64 but `top_p_R`. A decode row is one query token: a new one, or one of the
    generated tokens that are replayed.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    full_slots_T: Tensor  # empty without a full pool
    window_slots_T: Tensor  # empty without a window pool
    decode_full_RB: Tensor
    decode_window_RB: Tensor
    decode_lens_R: Tensor  # context length of each row, its own token included
    top_p_R: Tensor  # float32; NaN: the checkpoint's value per head
    prefill_full_SB: Tensor
    prefill_window_SB: Tensor
    prefill_starts: Tensor  # [S + 1], offsets among the prefill tokens
    prefill_lens_S: Tensor  # context length after each span
    prefill_dense_from_S: Tensor | None = None
    """Position from which a prompt's tokens read everything in a sparse prefill; None: from 0."""

    @property
    def num_decode_rows(self) -> int:
        return self.decode_lens_R.shape[0]

    @property
    def num_prefill_spans(self) -> int:
        return self.prefill_lens_S.shape[0]


class BlockTables:
    """One row of page ids per slot, kept between steps, so that a step adds only new pages.

    Entries of pages that slid out of the window are left as they were: no op reads them.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        shape = (max_num_seqs + 1, max_blocks)
        self.rows_SB = torch.zeros(shape, dtype=torch.int64, device=device)
        self._width = max_blocks
        self.spare_slot = max_num_seqs
        """A row that no sequence has, for rows that pad a batch."""
        self._owners: list[tuple[int, int] | None] = [None] * max_num_seqs
        self._lengths = [0] * max_num_seqs

    def update(self, span: Span, blocks: list[int]) -> None:
        """Bring the row of the span's slot up to date."""
        slot, owner = span.slot, (span.request_id, span.epoch)
        if self._owners[slot] != owner:
            self._owners[slot] = owner
            self._lengths[slot] = 0
        known = self._lengths[slot]
        assert len(blocks) <= self._width, "a context of more blocks than the tables have columns"
        if known < len(blocks):
            pages = upload(blocks[known:], torch.int64, self.rows_SB.device)
            self.rows_SB[slot, known : len(blocks)] = pages
            self._lengths[slot] = len(blocks)

    def forget(self, request_id: int) -> None:
        """Nobody owns the rows of a request that ended; they are written anew for the next one."""
        self._owners = [
            None if owner is not None and owner[0] == request_id else owner
            for owner in self._owners
        ]

    def extend(self, span: Span, blocks: list[int], column: int) -> int:
        """The page of logical block `column`, the only one that the device may still lack.

        Whoever calls puts it into the table there; what else is missing is sent at once.
        """
        if not blocks:
            return 0
        # Past the last column the device would fail for good, without saying where.
        assert column < self._width, "a context of more blocks than the tables have columns"
        slot = span.slot
        if self._owners[slot] == (span.request_id, span.epoch) and self._lengths[slot] >= column:
            self._lengths[slot] = max(self._lengths[slot], column + 1)
        else:
            self.update(span, blocks)
        return blocks[column]

    def rows(self, slots: list[int], width: int) -> Tensor:
        """[len(slots), width]; a view where all rows are of one slot (a long replay)."""
        if slots and slots.count(slots[0]) == len(slots):
            return self.rows_SB[slots[0], :width].expand(len(slots), -1)
        return self.rows_SB[upload(slots, torch.int64, self.rows_SB.device), :width]


class BatchTensors:
    """Builds `AttentionMetadata`; owns the block tables of both pools."""

    def __init__(
        self, *, max_num_seqs: int, max_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self._block_tokens = block_tokens
        self._device = device
        self.full = BlockTables(max_num_seqs, max_blocks, device)
        self.window = BlockTables(max_num_seqs, max_blocks, device)

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended; unknown ids are ignored."""
        for tables in (self.full, self.window):
            tables.forget(request_id)

    def build(self, batch: Batch, requests: Mapping[int, Request]) -> AttentionMetadata:
        """Tensors of a batch that has its decode spans first; `requests` by request id."""
        for span in batch.spans:
            self.full.update(span, span.full_blocks)
            self.window.update(span, span.window_blocks)
        decodes = [span for span in batch.spans if span.rule == "decode"]
        prefills = [span for span in batch.spans if span.rule == "prefill"]
        assert batch.spans == decodes + prefills, "decode spans come first"
        rows = [span for span in decodes for _ in span.tokens]
        row_slots = [span.slot for span in rows]
        lens = [start + 1 for span in decodes for start in range(span.start, span.stop)]
        top_p = [requests[span.request_id].params.attention_top_p for span in rows]
        span_slots = [span.slot for span in prefills]
        starts = list(accumulate((len(span.tokens) for span in prefills), initial=0))
        decode_width = self._width(decodes)
        prefill_width = self._width(prefills)
        return AttentionMetadata(
            token_ids_T=self._ints(list(chain.from_iterable(s.tokens for s in batch.spans))),
            positions_T=self._ints(
                list(chain.from_iterable(range(s.start, s.stop) for s in batch.spans))
            ),
            full_slots_T=self._slots(batch, full=True),
            window_slots_T=self._slots(batch, full=False),
            decode_full_RB=self.full.rows(row_slots, decode_width),
            decode_window_RB=self.window.rows(row_slots, decode_width),
            decode_lens_R=self._ints(lens),
            top_p_R=upload(
                [math.nan if p is None else p for p in top_p], torch.float32, self._device
            ),
            prefill_full_SB=self.full.rows(span_slots, prefill_width),
            prefill_window_SB=self.window.rows(span_slots, prefill_width),
            prefill_starts=self._ints(starts),
            prefill_lens_S=self._ints([span.stop for span in prefills]),
            prefill_dense_from_S=self._ints(
                [len(requests[span.request_id].prompt) - DENSE_TAIL for span in prefills]
            ),
        )

    def _slots(self, batch: Batch, *, full: bool) -> Tensor:
        """Slot of every token in one pool: page * block_tokens + place; empty without the pool."""
        block = self._block_tokens
        slots: list[int] = []
        for span in batch.spans:
            pages = span.full_blocks if full else span.window_blocks
            if not pages:
                continue
            for column in range(span.start // block, -(-span.stop // block)):
                first, shift = column * block, (pages[column] - column) * block
                start, stop = max(first, span.start), min(first + block, span.stop)
                slots.extend(range(start + shift, stop + shift))
        return self._ints(slots)

    def _width(self, spans: list[Span]) -> int:
        """Blocks of the longest context among the spans."""
        return max((-(-span.stop // self._block_tokens) for span in spans), default=1)

    def _ints(self, values: list[int]) -> Tensor:
        return upload(values, torch.int64, self._device)
