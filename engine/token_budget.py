"""How many tokens the retrieval heads attended: the token budget of a step.

Legend: R decode rows of the batch, S decode rows that sample, H retrieval heads of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.batch import Batch
from engine.messages import Attended


def step_budget(
    batch: Batch, attended: Mapping[int, torch.Tensor]
) -> tuple[dict[int, Attended], dict[int, float]]:
    """Budget by request id, and mean fraction by layer; both empty where nothing was selected.

    Only rows that sample count: a replayed row was counted when its token was new.

    Args:
        batch: decode spans first.
        attended: by layer, tokens attended, int64 [R, H]; 0 where a row did not select.
    """
    owners = _sampling_rows(batch)
    if not attended or not owners:
        return {}, {}
    rows = [row for row, _, _ in owners]
    counts_SH = torch.cat([counts_RH[rows] for counts_RH in attended.values()], dim=1).cpu()
    context_S1 = torch.tensor([[context] for _, _, context in owners])
    fractions_SH = counts_SH / context_S1
    by_request = {
        request_id: Attended(int((counts > 0).sum()), int(counts.sum()), float(fractions.sum()))
        for (_, request_id, _), counts, fractions in zip(
            owners, counts_SH, fractions_SH, strict=True
        )
        if counts.any()
    }
    widths = [counts_RH.shape[1] for counts_RH in attended.values()]
    by_layer = {
        layer: float(fractions[fractions > 0].mean())
        for layer, fractions in zip(attended, torch.split(fractions_SH, widths, 1), strict=True)
        if fractions.any()
    }
    return by_request, by_layer


def _sampling_rows(batch: Batch) -> list[tuple[int, int, int]]:
    """Decode row, request id and context length of each decode span that samples."""
    rows, end = [], 0
    for span in batch.spans:
        if span.rule == "decode":
            end += len(span.tokens)
            if span.sample:
                rows.append((end - 1, span.request_id, span.stop))
    return rows
