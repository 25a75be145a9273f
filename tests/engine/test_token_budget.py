"""The token budget of a step: which rows count, and what they attended."""

from __future__ import annotations

import pytest
import torch

from engine.batch import Batch, Span
from engine.token_budget import queue_budget
from engine.transfer import Readback


def span(request_id: int, start: int, count: int, rule: str, sample: bool) -> Span:
    tokens = [0] * count
    return Span(request_id, 0, start, tokens, rule, [], [], sample)  # type: ignore[arg-type]  # Literal


def test_the_budget_counts_rows_that_sample_and_selected() -> None:
    batch = Batch(
        [
            span(1, 19, 1, "decode", True),  # row 0, context 20
            span(2, 30, 3, "decode", True),  # rows 1 to 3: only the last is new, context 33
            span(3, 40, 2, "decode", False),  # rows 4 and 5: replay goes on
            span(4, 9, 1, "decode", True),  # row 6: below dense_below, selected nothing
            span(5, 0, 8, "prefill", True),
        ]
    )
    attended = {
        0: torch.tensor([[10], [1], [1], [11], [1], [1], [0]]),
        2: torch.tensor([[5, 20], [1, 1], [1, 1], [22, 33], [1, 1], [1, 1], [0, 0]]),
    }
    readback = Readback()
    pending = queue_budget(batch, attended, readback)
    assert pending is not None
    by_request, by_layer = pending.read(readback.fetch())
    assert [(i, a.pairs, a.tokens) for i, a in by_request.items()] == [(1, 3, 35), (2, 3, 66)]
    assert by_request[1].fraction == pytest.approx(0.5 + 0.25 + 1.0)
    assert by_request[2].fraction == pytest.approx(1 / 3 + 2 / 3 + 1.0)
    assert by_layer[0] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert by_layer[2] == pytest.approx((0.25 + 1 + 2 / 3 + 1) / 4)


def test_the_budget_of_a_step_without_selection_is_empty() -> None:
    assert queue_budget(Batch([span(1, 0, 4, "prefill", True)]), {}, Readback()) is None
