"""A step is put together within its budget and within the pages that are there."""

from __future__ import annotations

from engine.kv_pools import KvPools
from engine.request import Request, SamplingParams
from engine.step_draft import StepDraft
from tests.engine.scheduler_bench import BLOCK


def make_pools(full_pages: int = 100) -> KvPools:
    return KvPools(full_pages=full_pages, window_pages=0, block_tokens=BLOCK)


def make_request(request_id: int, prompt_len: int, output: list[int] | None = None) -> Request:
    params = SamplingParams(max_tokens=8)
    request = Request(request_id, list(range(prompt_len)), params, output=output)
    request.slot = request_id
    return request


def test_takes_what_the_budget_leaves() -> None:
    draft = StepDraft(10, make_pools())
    first, second, third = (make_request(i, 20) for i in range(3))
    assert draft.add(first, 6)
    assert draft.add(second, 6)
    assert [len(span.tokens) for span in draft.batch().spans] == [6, 4]
    assert draft.budget == 0
    assert draft.add(third, 6), "there are pages, if no budget"
    assert (list(draft.spans), third.full_blocks) == ([0, 1], [])


def test_takes_as_many_positions_as_there_are_pages_for() -> None:
    draft = StepDraft(100, make_pools(full_pages=3))
    first, second, third = (make_request(i, 7) for i in range(3))
    assert draft.add(first, 7)
    assert draft.add(second, 7)
    assert not draft.add(third, 7)
    assert [(span.stop, span.sample) for span in draft.batch().spans] == [(7, True), (4, False)]
    assert (draft.budget, third.full_blocks) == (100 - 7 - 4, [])


def test_a_span_ends_where_the_rule_changes() -> None:
    draft = StepDraft(100, make_pools())
    resumed = make_request(0, 5, output=[70, 71, 72])
    draft.add(resumed, 100)
    (span,) = draft.batch().spans
    assert (span.rule, span.start, span.stop, span.sample) == ("prefill", 0, 5, False)
    resumed.computed = 5
    draft.add(resumed, 100)
    (span,) = draft.batch().spans
    assert (span.rule, span.start, span.tokens, span.sample) == ("decode", 5, [70, 71, 72], True)


def test_decode_spans_come_first_in_the_batch() -> None:
    draft = StepDraft(100, make_pools())
    prompt, row = make_request(0, 5), make_request(1, 5, output=[70])
    row.computed = 5
    draft.add(prompt, 5)
    draft.add(row, 1)
    assert [span.request_id for span in draft.batch().spans] == [1, 0]


def test_what_is_left_out_gives_its_budget_back() -> None:
    draft = StepDraft(10, make_pools())
    assert draft.is_empty
    draft.add(make_request(0, 8), 8)
    draft.drop(0)
    draft.drop(0)
    assert (draft.budget, draft.is_empty, draft.batch().spans) == (10, True, [])
