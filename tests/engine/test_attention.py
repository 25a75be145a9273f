"""PagedAttention against naive n x n masks: head layouts, batches, chunks, replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.batch import Batch, Span
from engine.model.batch_tensors import BatchTensors, BlockTables
from engine.request import Request, SamplingParams
from tests.engine.head_map_model import make_model
from tests.engine.paged_driver import RAGGED, Driver, ragged_outputs

LAYOUTS: dict[str, dict[str, Any]] = {
    "no-retrieval": {"retrieval": [[]]},
    "all-retrieval": {"retrieval": [[0, 1, 2, 3]]},
    "one-head": {"retrieval": [[3]]},
    "mixed-groups": {"retrieval": [[0, 3]]},
    "uneven-groups": {"retrieval": [[0, 1, 4]], "heads": 6, "kv_heads": 2},
    "three-kv-heads": {"retrieval": [[2, 5]], "heads": 6, "kv_heads": 3},
    "one-kv-head": {"retrieval": [[1, 2]], "kv_heads": 1},
    "no-grouping": {"retrieval": [[1, 3]], "kv_heads": 4},
    "index-per-kv-head": {"retrieval": [[0, 1, 3]], "scope": "kv_head"},
    "index-per-last-kv-head": {"retrieval": [[2, 3]], "scope": "kv_head"},
    "no-indexer": {"retrieval": [[0, 3]], "index_dim": None},
    "dense-model": {"retrieval": None, "layers": 2},
    "layers-differ": {"retrieval": [[], [0, 1, 2, 3], [2]]},
    "dense-below": {"retrieval": [[0, 3]], "dense_below": 45},
    "no-sinks": {"retrieval": [[1]], "sinks": 0},
    "sinks-fill-a-block": {"retrieval": [[1]], "sinks": 8},
    "window-of-one": {"retrieval": [[1]], "window": 1},
    "window-of-a-block": {"retrieval": [[1]], "window": 8},
    "window-longer-than-all": {"retrieval": [[1]], "window": 500},
    "top-p-one": {"retrieval": [[0, 2]], "top_p": 1.0},
    "bias-by-age": {"retrieval": [[0, 3], [1, 2, 3]], "age_bias": True},
    "bias-and-index-per-kv-head": {
        "retrieval": [[0, 1, 3]],
        "age_bias": True,
        "scope": "kv_head",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ragged_batches_equal_naive_masks(layout: dict[str, Any]) -> None:
    """Chunked prefills and decodes of three sequences, mixed in every step."""
    driver = Driver(make_model(**layout), RAGGED)
    for index, got in enumerate(ragged_outputs(driver)):
        torch.testing.assert_close(got, driver.expected(index))


def test_replay_after_preemption_repeats_every_step() -> None:
    """Generated tokens computed in one span, on other pages, give what single steps gave."""
    driver = Driver(make_model([[0, 3]]), [(30, 60), (5, 9)])
    (prompt, _) = driver.step([(0, 30, "prefill"), (1, 5, "prefill")])
    steps = [prompt, *(driver.step([(0, 1, "decode")])[0] for _ in range(30))]
    driver.restart(0)
    replay = [driver.step([(0, 30, "prefill")])[0], driver.step([(0, 30, "decode")])[0]]
    torch.testing.assert_close(torch.cat(replay, dim=1), torch.cat(steps, dim=1))


@pytest.mark.parametrize("layout", ["mixed-groups", "index-per-kv-head", "dense-below"])
def test_int8_index_keys_equal_naive_masks(layout: str) -> None:
    """Rounded once, when they are stored: chunks, decode rows and replays select by the same."""
    driver = Driver(make_model(**LAYOUTS[layout]), RAGGED, index_dtype="int8")
    for index, got in enumerate(ragged_outputs(driver)):
        torch.testing.assert_close(got, driver.expected(index))


def test_replay_with_int8_index_keys_repeats_every_step() -> None:
    driver = Driver(make_model([[0, 3]]), [(30, 60), (5, 9)], index_dtype="int8")
    (prompt, _) = driver.step([(0, 30, "prefill"), (1, 5, "prefill")])
    steps = [prompt, *(driver.step([(0, 1, "decode")])[0] for _ in range(30))]
    driver.restart(0)
    replay = [driver.step([(0, 30, "prefill")])[0], driver.step([(0, 30, "decode")])[0]]
    torch.testing.assert_close(torch.cat(replay, dim=1), torch.cat(steps, dim=1))


def test_a_slot_taken_over_holds_the_new_pages() -> None:
    """A sequence in the slot of another, or back on other pages, must not read old entries."""
    tables = BlockTables(1, 8, torch.device("cpu"))
    tables.update(Span(1, 0, 0, [0] * 30, "prefill", [5, 6, 7, 8], [], True), [5, 6, 7, 8])
    tables.update(Span(1, 0, 30, [0] * 10, "decode", [5, 6, 7, 8, 9], [], True), [5, 6, 7, 8, 9])
    assert tables.rows([0], 5).tolist() == [[5, 6, 7, 8, 9]]
    tables.update(Span(1, 0, 0, [0] * 9, "prefill", [3, 4], [], True, epoch=1), [3, 4])
    assert tables.rows([0], 2).tolist() == [[3, 4]]
    tables.forget(1)
    tables.update(Span(1, 0, 0, [0] * 9, "prefill", [6, 7], [], True, epoch=1), [6, 7])
    assert tables.rows([0], 2).tolist() == [[6, 7]]
    tables.update(Span(2, 0, 0, [0] * 9, "prefill", [2, 1], [], True, epoch=1), [2, 1])
    assert tables.rows([0], 2).tolist() == [[2, 1]]


def test_requests_bring_their_own_selection_mass() -> None:
    driver = Driver(make_model([[0, 3]], top_p=0.3), [(60, 70), (60, 70)], top_p=[None, 1.0])
    driver.step([(0, 60, "prefill"), (1, 60, "prefill")])
    outputs = driver.step([(0, 10, "decode"), (1, 10, "decode")])
    for index, out in enumerate(outputs):
        torch.testing.assert_close(out, driver.expected(index)[:, 60:])
    counts_RH = driver.attended()[0]
    assert counts_RH[10:].tolist() == [[length, length] for length in range(61, 71)]
    assert counts_RH[:10].sum() < counts_RH[10:].sum()


def test_token_budget_counts_selecting_rows_only() -> None:
    """Rows below dense_below count 0, prompt tokens and layers without selection nothing."""
    driver = Driver(make_model([[0, 3], []], dense_below=50), [(40, 49), (50, 51), (8, 8)])
    driver.step([(0, 40, "prefill"), (1, 50, "prefill")])
    driver.step([(0, 9, "decode"), (1, 1, "decode"), (2, 8, "prefill")])
    counts = driver.attended()
    assert counts.keys() == {0}
    assert counts[0].shape == (10, 2)
    assert not counts[0][:9].any()
    # The forced blocks 0, 5 and 6 hold 8 + 8 + 3 of the 51 tokens.
    assert ((counts[0][9] >= 19) & (counts[0][9] <= 51)).all()


def test_a_step_without_selection_counts_nothing() -> None:
    driver = Driver(make_model([[0, 3]]), [(40, 49)])
    driver.step([(0, 40, "prefill")])
    assert driver.attended() == {}


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
@pytest.mark.parametrize("layout", ["mixed-groups", "no-retrieval", "dense-model"])
def test_a_sequence_full_of_nan_spoils_no_other(layout: str, index_dtype: Any) -> None:
    """Values that are not finite stay in their own rows, selection included."""
    driver = Driver(make_model(**LAYOUTS[layout]), [(40, 44), (40, 44)], index_dtype=index_dtype)
    for name in ("q_pre", "k_pre", "q", "k", "v"):
        getattr(driver.sequences[0], name).fill_(torch.nan)
    prefill = driver.step([(0, 40, "prefill"), (1, 40, "prefill")])[1]
    decode = driver.step([(0, 4, "decode"), (1, 4, "decode")])[1]
    torch.testing.assert_close(torch.cat([prefill, decode], dim=1), driver.expected(1))


def test_decode_spans_must_come_first() -> None:
    spans = [
        Span(1, 0, 0, [0], "prefill", [1], [1], True),
        Span(2, 1, 3, [0], "decode", [2], [2], True),
    ]
    requests = {index: Request(index, [0], SamplingParams()) for index in (1, 2)}
    tensors = BatchTensors(max_num_seqs=2, max_blocks=8, block_tokens=8, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="decode spans come first"):
        tensors.build(Batch(spans), requests)
