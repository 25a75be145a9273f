"""Buffers of a decode step: what a batch puts into them, what stays from the step before."""

from __future__ import annotations

import torch

from engine.batch import NEWEST_TOKEN, Batch, Span
from engine.decode_buffers import DecodeBuffers
from engine.model.batch_tensors import BlockTables
from engine.request import Request, SamplingParams

CPU = torch.device("cpu")


def buffers_of(rows: int) -> tuple[DecodeBuffers, BlockTables, BlockTables]:
    full, window = (BlockTables(rows, 8, CPU) for _ in range(2))
    return DecodeBuffers(rows, full, window, 16), full, window


def test_buffers_hold_the_batch_and_padding() -> None:
    buffers, full, _ = buffers_of(4)
    spans = [
        Span(1, 2, 35, [50], "decode", [4, 6, 5], [0, 3, 8], True),
        Span(2, 0, 16, [51], "decode", [9, 7], [2, 1], False),
    ]
    params = {1: SamplingParams(attention_top_p=0.25), 2: SamplingParams()}
    buffers.fill(Batch(spans), {i: Request(i, [0], p) for i, p in params.items()})
    metadata = buffers.metadata(4)
    assert metadata.token_ids_T.tolist() == [50, 51, 0, 0]
    assert metadata.positions_T.tolist() == [35, 16, 0, 0]
    assert metadata.decode_lens_R.tolist() == [36, 17, 0, 0]
    assert metadata.full_slots_T.tolist() == [5 * 16 + 3, 7 * 16, 0, 0]
    assert metadata.window_slots_T.tolist() == [8 * 16 + 3, 16, 0, 0]
    assert metadata.decode_full_RB[:2, :3].tolist() == [[4, 6, 5], [9, 7, 0]]
    assert not metadata.decode_full_RB[2:].any()
    assert metadata.top_p_R[0] == 0.25
    assert metadata.top_p_R[1:].isnan().all()
    assert buffers._inputs[6].tolist() == [1, 0, 0, 0]
    assert full.rows([2, 0], 3).tolist() == [[4, 6, 5], [9, 7, 0]]


def test_a_row_goes_on_from_what_the_step_before_chose_in_its_slot() -> None:
    """Whichever rows the two steps have it in; another token may have been drawn meanwhile."""
    buffers, _, _ = buffers_of(4)
    requests = {i: Request(i, [0], SamplingParams()) for i in (1, 2, 3)}

    def fill(*rows: tuple[int, int, int]) -> None:
        spans = [
            Span(i, slot, 16, [token], "decode", [1, 2], [1, 2], True) for i, slot, token in rows
        ]
        buffers.fill(Batch(spans), requests)

    fill((1, 2, 50), (2, 0, 51), (3, 3, 52))
    logits = torch.zeros(4, 60)
    logits[range(4), [7, 8, 9, 10]] = 1.0
    buffers.pick_tokens(logits, torch.zeros(4, 8), None)
    buffers.keep(torch.tensor([20]), torch.tensor([2]))
    fill((3, 3, NEWEST_TOKEN), (1, 2, NEWEST_TOKEN), (2, 0, 53))
    assert buffers.metadata(4).token_ids_T.tolist() == [20, 7, 53, 0]


def test_a_copy_that_is_under_way_is_not_written_over() -> None:
    """The inputs of two steps in a row leave from different memory."""
    buffers, _, _ = buffers_of(1)
    request = {1: Request(1, [0], SamplingParams())}
    sources = []
    for token in (50, 51, 52):
        buffers.fill(Batch([Span(1, 0, 16, [token], "decode", [1, 2], [], True)]), request)
        sources.append(buffers._host)
        assert [source[0].item() for source in sources[-2:]] == [token - 1, token][-len(sources) :]


def test_only_the_newest_page_is_left_to_the_device() -> None:
    """A sequence that enters, or that missed pages, is sent whole; else one page a row suffices."""
    buffers, full, _ = buffers_of(1)
    request = {1: Request(1, [0], SamplingParams())}
    pages = [3, 4, 5, 6]
    for position, known in ((31, 2), (32, 3), (63, 4)):
        span = Span(1, 0, position, [9], "decode", pages[:known], [], True)
        buffers.fill(Batch([span]), request)
        buffers.metadata(1)
        assert full.rows([0], known).tolist() == [pages[:known]]
