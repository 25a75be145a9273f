"""The indexer: score every block in the index space, select by top-p; see `kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_shapes
from kernels.block_age import age_bias
from kernels.reference import BINS, BINS_PER_NAT, MASS_UNIT
from kernels.row_slices import row_slices

MAX_GATHERED = 2**20  # index-key elements gathered at once; reused, so that it stays in the cache


def project_index(x_TND: Tensor, weight_HID: Tensor, head_H: Tensor) -> Tensor:
    """Project pre-RoPE queries or keys to the index space: [T, H, I].

    Args:
        x_TND: queries or keys after QK-norm, before RoPE.
        weight_HID: one projection per row of the result, in the dtype of x_TND.
        head_H: int64, which of the N heads each row projects.
    """
    check_shapes({}, x=(x_TND, "T N D"), weight=(weight_HID, "H I D"), head=(head_H, "H"))
    return torch.einsum("thd,hid->thi", x_TND[:, head_H], weight_HID)


def score_blocks(
    qi_RHI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    index_scales: Tensor | None = None,
    age_bias_HA: Tensor | None = None,
) -> Tensor:
    """Log mass of every block, float32 [R, H, B]: logsumexp of q·k over the block's valid tokens,
    and the bias of the block's age.

    Args:
        qi_RHI: index queries.
        index_row_H: int64, row of each head's index keys in the cache.
        index_cache: [P, index rows, K, I], in the dtype of the queries, or int8.
        block_tables_RB: int64 pages by logical block.
        context_lens_R: int64, valid tokens of each row; blocks past them get -inf.
        index_scales: bfloat16 [P, index rows, K], of int8 keys: what q·k is multiplied by.
        age_bias_HA: float32, as `kernels.block_age`; None: no bias.
    """
    sizes: dict[str, int] = {}
    check_shapes(
        sizes,
        qi=(qi_RHI, "R H I"),
        index_row=(index_row_H, "H"),
        index_cache=(index_cache, "P X K I"),
        block_tables=(block_tables_RB, "R B"),
        context_lens=(context_lens_R, "R"),
    )
    if index_scales is not None:
        check_shapes(sizes, index_scales=(index_scales, "P X K"))
    if age_bias_HA is not None:
        check_shapes(sizes, age_bias=(age_bias_HA, "H A"))
    rows, heads, dim = qi_RHI.shape
    width, block_tokens = block_tables_RB.shape[1], index_cache.shape[2]
    # Rows share a buffer as far as it goes, and a row is read to its own end only: fresh memory
    # and padding cost more than the product itself.
    log_mass_RHB = qi_RHI.new_full((rows, heads, width), float("-inf"), dtype=torch.float32)
    blocks_R = [-(-context // block_tokens) for context in context_lens_R.tolist()]
    slices = row_slices(blocks_R, heads * block_tokens * dim, MAX_GATHERED)
    most = max((part.stop - part.start) * max(blocks_R[part]) for part in slices)
    buffer = index_cache.new_empty((most * heads, block_tokens * dim))
    for part in slices:
        own = max(blocks_R[part])
        log_mass_RHB[part, :, :own] = _score_rows(
            qi_RHI[part],
            index_row_H,
            index_cache,
            block_tables_RB[part, :own],
            context_lens_R[part],
            index_scales,
            buffer,
        )
    if age_bias_HA is not None:
        log_mass_RHB += age_bias(age_bias_HA, context_lens_R, width, block_tokens)
    return log_mass_RHB


def _score_rows(
    qi_RHI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    index_scales: Tensor | None,
    buffer: Tensor,
) -> Tensor:
    """One gather that lays the keys out as [rows x heads, tokens, I], then one batched product."""
    rows, heads, dim = qi_RHI.shape
    _, index_rows, block_tokens, _ = index_cache.shape
    width = block_tables_RB.shape[1]
    pages_RHB = block_tables_RB[:, None] * index_rows + index_row_H[:, None]
    flat = index_cache.view(-1, block_tokens * dim)
    keys = torch.index_select(flat, 0, pages_RHB.flatten(), out=buffer[: pages_RHB.numel()])
    # Whole numbers of 8 bits are exact in any dtype of queries.
    keys = keys.view(rows * heads, width * block_tokens, dim).to(qi_RHI.dtype)
    # One row times a wide matrix: three times as fast as a tall matrix times one column.
    scores = torch.bmm(qi_RHI.reshape(rows * heads, 1, dim), keys.transpose(1, 2))
    positions = torch.arange(width * block_tokens, device=scores.device)
    past = (positions >= context_lens_R[:, None]).view(rows, 1, width, block_tokens)
    scores_RHBK = scores.view(rows, heads, width, block_tokens).float()
    if index_scales is not None:
        scores_RHBK = scores_RHBK * index_scales.view(-1, block_tokens)[pages_RHB]
    return scores_RHBK.masked_fill_(past, float("-inf")).logsumexp(-1)


def select_blocks(
    log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
) -> Tensor:
    """Dynamic top-p over blocks with a log-space histogram, bool [R, H, B].

    Args:
        log_mass_RHB: float32 from `score_blocks`; what is not finite has no mass, nor what lies
            past a row's context.
        top_p_RH: share of the mass to keep, in (0, 1]; 1 keeps every block.
        context_lens_R: int64, at least 1.
        block_tokens: tokens per block.
    """
    check_shapes(
        {},
        log_mass=(log_mass_RHB, "R H B"),
        top_p=(top_p_RH, "R H"),
        context_lens=(context_lens_R, "R"),
    )
    inside_RB, forced_RB = inside_and_forced(context_lens_R, log_mass_RHB.shape[-1], block_tokens)
    # What is not finite is of a sequence that has gone wrong: it has no mass, like what is past the
    # end, and must not become the index of a bin.
    has_mass_RHB = log_mass_RHB.isfinite() & inside_RB.unsqueeze(1)
    finite_RHB = log_mass_RHB.masked_fill(~has_mass_RHB, float("-inf"))
    most_RH1 = finite_RHB.amax(-1, keepdim=True).clamp_(min=torch.finfo(finite_RHB.dtype).min)
    below_RHB = most_RH1 - finite_RHB
    bin_RHB = (below_RHB * BINS_PER_NAT).clamp_(max=BINS - 1).long()
    mass_RHB = ((-below_RHB).exp().double() * MASS_UNIT).round_().long()
    histogram = mass_RHB.new_zeros((*mass_RHB.shape[:2], BINS)).scatter_add_(-1, bin_RHB, mass_RHB)
    cumulative = histogram.cumsum(-1)
    wanted_RH1 = (top_p_RH.double() * cumulative[..., -1].double()).unsqueeze(-1)
    threshold_RH = (cumulative.double() < wanted_RH1).sum(-1).clamp_(max=BINS - 1)
    threshold_RH = threshold_RH.masked_fill_(top_p_RH >= 1, BINS - 1)
    chosen_RHB = bin_RHB <= threshold_RH.unsqueeze(-1)
    return (chosen_RHB | forced_RB.unsqueeze(1)) & inside_RB.unsqueeze(1)


def inside_and_forced(
    context_lens_R: Tensor, width: int, block_tokens: int
) -> tuple[Tensor, Tensor]:
    """Blocks of each row's context, and those of them that selection keeps whatever their mass:
    of the sinks, of the row itself and the one before; both bool [R, B], B = `width`."""
    block_B = torch.arange(width, device=context_lens_R.device)
    last_R1 = ((context_lens_R - 1) // block_tokens).unsqueeze(1)
    inside_RB = block_B <= last_R1
    return inside_RB, ((block_B == 0) | (block_B >= last_R1 - 1)) & inside_RB


def count_attended(mask_RHB: Tensor, context_lens_R: Tensor, block_tokens: int) -> Tensor:
    """Tokens in the kept blocks per row and head, int64 [R, H]; the last may be partial."""
    check_shapes({}, mask=(mask_RHB, "R H B"), context_lens=(context_lens_R, "R"))
    start_B = torch.arange(mask_RHB.shape[-1], device=mask_RHB.device) * block_tokens
    valid_RB = (context_lens_R[:, None] - start_B).clamp_(0, block_tokens)
    return (mask_RHB * valid_RB[:, None]).sum(-1)
