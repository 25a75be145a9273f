"""Runs generated traces through a variant, teacher-forced under the decode rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from conversion.chunk_sizes import chunk_sizes
from conversion.evaluation.teacher_forced import Variant
from conversion.evaluation.traces import Trace


@torch.no_grad()
def right_steps(variant: Variant, trace: Trace) -> list[bool]:
    """Which steps are answered exactly: every token is the best guess after those before it."""
    ids = [*trace.prompt, *trace.generated]
    sequence = variant.sequence(len(ids))
    # The last prompt token runs under the decode rule too: the first step may begin right after it.
    begin = len(trace.prompt) - 1
    sequence.prefill(ids[:begin])
    guesses: list[int] = []
    at_once = chunk_sizes(variant.device).decode_rows
    for start in range(begin, len(ids) - 1, at_once):
        rows = ids[start : min(start + at_once, len(ids) - 1)]
        hidden_RE = variant.generate(sequence, rows)
        guesses += variant.decoder.logits(hidden_RE).argmax(-1).tolist()
    return [
        guesses[step.start - 1 - begin : step.stop - 1 - begin] == ids[step.start : step.stop]
        for step in trace.steps
    ]


def split_by_distance(
    traces: Sequence[Trace], scores: Sequence[Sequence[bool]], edges: Sequence[int]
) -> dict[str, list[tuple[float, ...]]]:
    """Scores per trace in groups of steps by the distance of what they need.

    Args:
        edges: ascending distances in tokens; the first group is below the first edge.
    """
    limits = [0, *edges, None]
    groups: dict[str, list[tuple[float, ...]]] = {}
    for low, high in pairwise(limits):
        assert low is not None
        name = (
            f"{low} or more" if high is None else f"below {high}" if low == 0 else f"{low}-{high}"
        )
        groups[name] = [
            tuple(
                float(right)
                for step, right in zip(trace.steps, own, strict=True)
                if low <= step.distance and (high is None or step.distance < high)
            )
            for trace, own in zip(traces, scores, strict=True)
        ]
    return groups
