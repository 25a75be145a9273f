"""The ends of a decode step in PyTorch: where its rows stand, and what they yield.

`kernels.cuda_step` does each in one launch; this is its specification, and what runs without it.

Shapes: R rows, B block-table width, V logits width, E hidden size, H heads of all layers that
select.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INPUT_ROWS = 8  # token, position, context, row of the tables, full and window page, samples, top_p
TABLE_ROW = 3  # the place of that one among them
NEWEST_TOKEN = -1  # for a token: what the step before chose for the same row of the tables


class PlacedRows(NamedTuple):
    """What the rows of a step compute, where they are stored, and what they read."""

    token_ids_R: Tensor  # int64
    token_slots_R: tuple[Tensor, Tensor]  # int64, page * block_tokens + place in the page; by pool,
    tables_RB: tuple[Tensor, Tensor]  # int64 pages by logical block; full and window
    top_p_R: Tensor  # float32, NaN where the request has none of its own


def place_rows(
    inputs_8R: Tensor, newest_S: Tensor, full_SB: Tensor, window_SB: Tensor, block_tokens: int
) -> PlacedRows:
    """Put each row's newest page into its block tables, and read what the rows need.

    Args:
        inputs_8R: int64, a column for each row: `INPUT_ROWS`; top_p as the bits of a float64. Rows
            that pad a batch write the null page to a row of the tables that nobody has.
        newest_S: int64, by row of the tables: what `NEWEST_TOKEN` stands for.
        full_SB, window_SB: int64 block tables, written.
    """
    token, position, _, table_row, full_page, window_page, _, top_p = inputs_8R
    column_R, place_R = position // block_tokens, position % block_tokens
    tables_RB = []
    for table_SB, page_R in ((full_SB, full_page), (window_SB, window_page)):
        table_SB.index_put_((table_row, column_R), page_R)
        tables_RB.append(table_SB.index_select(0, table_row))
    slots_R = (full_page * block_tokens + place_R, window_page * block_tokens + place_R)
    tokens_R = torch.where(token == NEWEST_TOKEN, newest_S.index_select(0, table_row), token)
    own_R = top_p.view(torch.float64).float()
    return PlacedRows(tokens_R, slots_R, (tables_RB[0], tables_RB[1]), own_R)


def pick_tokens(
    logits_RV: Tensor,
    hidden_RE: Tensor,
    counts_RH: Tensor | None,
    inputs_8R: Tensor,
    newest_S: Tensor,
) -> Tensor:
    """All that a step yields as numbers, float64, one behind the other:

        tokens [R]     the argmax of the logits, the lowest id of those that are equal
        finite [R]     1 where all hidden states and logits are finite; else the token means nothing
        budget [3 R + 2 H], if there are counts: the five parts of `sum_counts`, of the rows that
            sample

    The tokens go to `newest_S` as well, for a next step that starts before the host has read them.

    Args:
        logits_RV, hidden_RE: bfloat16 or float32.
        counts_RH: int64 tokens that each head attended, 0 where it did not select.
        inputs_8R: as `place_rows`; a context of 0 pads.
        newest_S: int64, written where a row of the tables has a context.
    """
    _, _, context_R, table_row_R, _, _, samples_R, _ = inputs_8R
    bounds_R = [bound for rows in (logits_RV, hidden_RE) for bound in rows.aminmax(dim=-1)]
    finite_R = torch.stack(bounds_R).isfinite().all(0)  # NaN carries through both
    tokens_R = logits_RV.argmax(dim=-1)
    kept_R = torch.where(context_R > 0, tokens_R, newest_S.index_select(0, table_row_R))
    newest_S.index_put_((table_row_R,), kept_R)
    parts = [tokens_R.double(), finite_R.double()]
    if counts_RH is not None:
        parts += sum_counts(counts_RH * samples_R.unsqueeze(1), context_R)
    return torch.cat(parts)


def sum_counts(
    counts_RH: Tensor, context_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each row: heads that selected, tokens they attended, the same over the context [R]; of
    each head: tokens over the context, rows in which it selected [H]. All float64."""
    fraction_RH = counts_RH.double() / context_R.clamp(min=1).unsqueeze(1)
    chosen_RH = (counts_RH > 0).double()
    tokens_R = counts_RH.sum(1).double()
    return chosen_RH.sum(1), tokens_R, fraction_RH.sum(1), fraction_RH.sum(0), chosen_RH.sum(0)
