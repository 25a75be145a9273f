"""What a batch derives from its spans."""

from __future__ import annotations

from engine.batch import Batch, Span


def span(request_id: int, count: int) -> Span:
    return Span(request_id, 0, 0, [1] * count, "prefill", [1], [1], True)


def test_rows_lie_behind_each_other() -> None:
    assert Batch([]).rows() == []
    batch = Batch([span(7, 2), span(8, 1), span(9, 2)])
    assert batch.rows() == [(0, 2), (2, 3), (3, 5)]
