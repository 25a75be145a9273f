"""The specification of `kernels.indexer`: one row and one head at a time, in float32.

    T tokens, R decode rows (one query token each), H query heads of the call, N heads to choose
    from, D head_dim, I index_dim, P pages, K tokens of a page (block), B block-table width,
    A ranges of ages

Block tables are int64, indexed by logical block; `context_lens_R` counts a row's valid tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 256  # of the selection histogram
BINS_PER_NAT = 8
MASS_UNIT = 2.0**32  # masses are summed as whole multiples of 1 / MASS_UNIT, so order cannot matter


def project_index(x_TND: Tensor, weight_HID: Tensor, head_H: Tensor) -> Tensor:
    """Project pre-RoPE queries or keys to the index space: [T, H, I].

    Row h of the result is weight_HID[h] applied to x_TND[:, head_H[h]].
    """
    rows = [
        x_TND[:, head].float() @ weight_HID[row].float().T
        for row, head in enumerate(head_H.tolist())
    ]
    return torch.stack(rows, dim=1)


def score_blocks(
    qi_RHI: Tensor,
    index_row_H: Tensor,
    index_cache: Tensor,
    block_tables_RB: Tensor,
    context_lens_R: Tensor,
    index_scales: Tensor | None = None,
    age_bias_HA: Tensor | None = None,
) -> Tensor:
    """Log mass of every block, float32 [R, H, B]: logsumexp of q·k over the block's valid tokens.

    Blocks past the end of a row's context have -inf. With scales q·k is multiplied by the key's.
    With a bias a block's log mass has that of its age added: how many blocks before the row's
    newest one it lies, whose number of bits is the column, or the last column if there are more.
    """
    rows, width = block_tables_RB.shape
    log_mass_RHB = torch.full((rows, qi_RHI.shape[1], width), -math.inf)
    block_tokens = index_cache.shape[2]
    for row, context in enumerate(context_lens_R.tolist()):
        for head, index_row in enumerate(index_row_H.tolist()):
            for block in range(math.ceil(context / block_tokens)):
                valid = min(block_tokens, context - block * block_tokens)
                page = block_tables_RB[row, block]
                keys = index_cache[page, index_row, :valid].float()
                scores = keys @ qi_RHI[row, head].float()
                if index_scales is not None:
                    scores *= index_scales[page, index_row, :valid].float()
                log_mass = scores.logsumexp(0)
                if age_bias_HA is not None:
                    age = (context - 1) // block_tokens - block
                    log_mass += age_bias_HA[head, min(age.bit_length(), age_bias_HA.shape[1] - 1)]
                log_mass_RHB[row, head, block] = log_mass
    return log_mass_RHB


def select_blocks(
    log_mass_RHB: Tensor, top_p_RH: Tensor, context_lens_R: Tensor, block_tokens: int
) -> Tensor:
    """Dynamic top-p over blocks, bool [R, H, B] (design section 5).

    Blocks fall into 256 bins of 1/8 nat below the head's largest log mass, the last bin open. Bins
    are taken from the top until their mass reaches top_p of the total; the bin that reaches it is
    taken whole, so the kept mass is never below top_p. top_p of 1 keeps every block. The first
    block (sinks), the newest and the one before it are always kept. A log mass that is not finite
    counts as no mass, so a sequence whose values have gone wrong selects what is forced.
    """
    mask_RHB = torch.zeros(log_mass_RHB.shape, dtype=torch.bool)
    for row, context in enumerate(context_lens_R.tolist()):
        blocks = math.ceil(context / block_tokens)
        for head in range(log_mass_RHB.shape[1]):
            mass_B = log_mass_RHB[row, head, :blocks]
            finite_B = mass_B.where(mass_B.isfinite(), torch.tensor(-math.inf))
            below_B = finite_B.max().clamp(min=torch.finfo(torch.float32).min) - finite_B
            bin_B = (below_B * BINS_PER_NAT).clamp(max=BINS - 1).long()
            mass_B = ((-below_B).exp().double() * MASS_UNIT).round().long()
            wanted = float(top_p_RH[row, head].double()) * float(mass_B.sum())
            taken = torch.zeros(BINS, dtype=torch.int64).index_add_(0, bin_B, mass_B).cumsum(0)
            threshold = int((taken >= wanted).int().argmax())
            if top_p_RH[row, head] >= 1:
                threshold = BINS - 1
            mask_RHB[row, head, :blocks] = bin_B <= threshold
            mask_RHB[row, head, [0, blocks - 1, max(blocks - 2, 0)]] = True
    return mask_RHB


def count_attended(mask_RHB: Tensor, context_lens_R: Tensor, block_tokens: int) -> Tensor:
    """Tokens in the kept blocks per row and head, int64 [R, H]; the last may be partial."""
    count_RH = torch.zeros(mask_RHB.shape[:2], dtype=torch.int64)
    for row, context in enumerate(context_lens_R.tolist()):
        for block in range(math.ceil(context / block_tokens)):
            valid = min(block_tokens, context - block * block_tokens)
            count_RH[row] += mask_RHB[row, :, block] * valid
    return count_RH
