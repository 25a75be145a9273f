"""Inputs of a decode step in device memory that stays where it is, so that a graph can read it.

Shapes: R rows, B block-table width.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from engine.batch import NEWEST_TOKEN, Batch
from engine.model.batch_tensors import AttentionMetadata, BlockTables
from engine.request import Request
from kernels import cuda_step, step_ops
from kernels._launch import KernelLibrary


def _bits(value: float) -> int:
    """The int64 of the same bits as a float64."""
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)


_NO_MASS = _bits(math.nan)


class DecodeBuffers:
    """One int64 buffer [8, max rows], filled from pinned memory by one copy a step.

    A row is a token: its id, position, context length and slot, the page that it is stored to in
    each pool, whether it samples, and its request's selection mass. In place of an id,
    `NEWEST_TOKEN` is what the step before chose in the same slot, which the device keeps. It puts
    the pages into the block tables itself, so that nothing else has to be sent. Rows past the batch
    pad it: their context is 0, and they write to the null page and to a row of the tables that
    nobody has.
    """

    def __init__(
        self,
        max_rows: int,
        full: BlockTables,
        window: BlockTables,
        block_tokens: int,
        library: KernelLibrary | None = None,
    ) -> None:
        """
        Args:
            full, window: tables of both pools, on the device, shared with the other steps.
            library: None: the PyTorch ops read the buffer.
        """
        assert NEWEST_TOKEN == step_ops.NEWEST_TOKEN, "tokens go to the device as they are"
        self._library = library
        self._tables = (full, window)
        self._block_tokens = block_tokens
        self._inputs = full.rows_SB.new_zeros((step_ops.INPUT_ROWS, max_rows))
        self._newest_S = full.rows_SB.new_zeros(len(full.rows_SB))
        pinned = self._inputs.device.type == "cuda"
        shape = self._inputs.shape
        self._host, self._spare = (
            torch.zeros(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2)
        )

    def fill(self, batch: Batch, requests: Mapping[int, Request]) -> None:
        """Start the copy of a batch whose spans are single tokens under the decode rule.

        From two pieces of pinned memory in turn: the step before may still have to be copied, the
        one before that has been waited for.
        """
        rows: list[tuple[int, ...]] = []
        (full, window), block_tokens = self._tables, self._block_tokens
        for span in batch.spans:  # written out: the device waits for it
            start, column = span.start, span.start // block_tokens
            full_page = full.extend(span, span.full_blocks, column)
            window_page = window.extend(span, span.window_blocks, column)
            own = requests[span.request_id].params.attention_top_p
            mass = _NO_MASS if own is None else _bits(own)
            place = (start, start + 1, span.slot, full_page, window_page)
            rows.append((span.tokens[0], *place, span.sample, mass))
        padding = (0, 0, 0, full.spare_slot, 0, 0, 0, _NO_MASS)
        rows += [padding] * (self._host.shape[1] - len(rows))
        values = array("q", chain.from_iterable(zip(*rows, strict=True)))
        self._host, self._spare = self._spare, self._host
        self._host.view(-1).numpy()[:] = values
        self._inputs.copy_(self._host, non_blocking=True)

    def keep(self, tokens_R: Tensor, rows_R: Tensor) -> None:
        """What was chosen for some rows of the step that was filled last, for the next one.

        Args:
            tokens_R, rows_R: int64, on the device.
        """
        table_rows_R = self._inputs[step_ops.TABLE_ROW].index_select(0, rows_R)
        self._newest_S.index_put_((table_rows_R,), tokens_R)

    def metadata(self, rows: int) -> AttentionMetadata:
        """What the first `rows` rows mean, computed on the device."""
        inputs = self._inputs[:, :rows]
        full, window = self._tables
        given = (inputs, self._newest_S, full.rows_SB, window.rows_SB, self._block_tokens)
        if self._library is None:
            placed = step_ops.place_rows(*given)
        else:
            placed = cuda_step.place_rows(self._library, *given)
        _, position, context, *_ = inputs
        none = position.new_empty(0)
        return AttentionMetadata(
            token_ids_T=placed.token_ids_R,
            positions_T=position,
            full_slots_T=placed.token_slots_R[0],
            window_slots_T=placed.token_slots_R[1],
            decode_full_RB=placed.tables_RB[0],
            decode_window_RB=placed.tables_RB[1],
            decode_lens_R=context,
            top_p_R=placed.top_p_R,
            prefill_full_SB=none.view(0, 1),
            prefill_window_SB=none.view(0, 1),
            prefill_starts=none,
            prefill_lens_S=none,
        )

    def pick_tokens(self, logits_RV: Tensor, hidden_RE: Tensor, counts_RH: Tensor | None) -> Tensor:
        """`step_ops.pick_tokens` of the first rows; their tokens are kept for the next step."""
        inputs = self._inputs[:, : len(logits_RV)]
        given = (logits_RV, hidden_RE, counts_RH, inputs, self._newest_S)
        if self._library is None:
            return step_ops.pick_tokens(*given)
        return cuda_step.pick_tokens(self._library, *given)
