"""How many tokens the retrieval heads attended: the token budget of a step.

Legend: R decode rows, S rows that are counted, H retrieval heads of all layers that select.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch import Batch
from engine.messages import Attended
from engine.transfer import Readback, upload
from kernels.step_ops import sum_counts

Budget = tuple[dict[int, Attended], dict[int, float]]  # by request id; mean fraction by layer


class BudgetSums(NamedTuple):
    """What is left of the counts when the device has summed them; float64."""

    pairs_S: Tensor  # heads that selected
    tokens_S: Tensor  # tokens attended, over these heads
    fraction_S: Tensor  # the same over the context length
    fraction_H: Tensor  # over the rows
    pairs_H: Tensor  # rows in which the head selected

    @classmethod
    def of(cls, counts: Sequence[Tensor], context_S: Tensor) -> BudgetSums:
        """
        Args:
            counts: tokens attended, int64 [S, heads] for every layer that selects; 0 where a row
                did not select.
            context_S: int64 context lengths.
        """
        return cls(*sum_counts(torch.cat(tuple(counts), dim=1), context_S))


@dataclass(frozen=True, slots=True)
class PendingBudget:
    """A budget on its way: places in a `Readback`, to be read when it was fetched."""

    owners: Sequence[tuple[int, int]]  # row among S, request id
    widths: Mapping[int, int]  # heads of each layer that selects, in the order of the counts
    places: Sequence[int]  # of the fields of BudgetSums

    def read(self, values: Sequence[Sequence[float]]) -> Budget:
        """By request id, and the mean fraction by layer; what selected nothing is left out."""
        pairs, tokens, fraction, head_fraction, head_pairs = (values[i] for i in self.places)
        by_request = {
            request_id: Attended(int(pairs[row]), int(tokens[row]), fraction[row])
            for row, request_id in self.owners
            if pairs[row]
        }
        by_layer, start = {}, 0
        for layer, width in self.widths.items():
            part = slice(start, start + width)
            if rows := sum(head_pairs[part]):
                by_layer[layer] = sum(head_fraction[part]) / rows
            start += width
        return by_request, by_layer


def queue_budget(
    batch: Batch, attended: Mapping[int, Tensor], readback: Readback
) -> PendingBudget | None:
    """The budget of a step that was run row by row; None where nothing was selected.

    Only rows that sample count: a replayed row was counted when its token was new.

    Args:
        batch: decode spans first.
        attended: by layer, tokens attended, int64 [R, heads]; 0 where a row did not select.
    """
    rows = _sampling_rows(batch)
    if not attended or not rows:
        return None
    device = next(iter(attended.values())).device
    at_S = upload([row for row, _, _ in rows], torch.int64, device)
    context_S = upload([context for _, _, context in rows], torch.int64, device)
    counts = [counts_RH[at_S] for counts_RH in attended.values()]
    sums = BudgetSums.of(counts, context_S)
    owners = [(place, request_id) for place, (_, request_id, _) in enumerate(rows)]
    widths = {layer: counts_RH.shape[1] for layer, counts_RH in attended.items()}
    return PendingBudget(owners, widths, [readback.add(part) for part in sums])


def _sampling_rows(batch: Batch) -> list[tuple[int, int, int]]:
    """Decode row, request id and context length of each decode span that samples."""
    rows, end = [], 0
    for span in batch.spans:
        if span.rule == "decode":
            end += len(span.tokens)
            if span.sample:
                rows.append((end - 1, span.request_id, span.stop))
    return rows
