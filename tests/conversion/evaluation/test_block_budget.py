"""A fixed number of blocks against a slow choice, and the count of what top-p takes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversion.evaluation.block_budget import CountedSelection, FixedBlocks
from conversion.evaluation.teacher_forced import Variant
from engine.model.attention_layers import BlockSelection
from kernels.indexer import select_blocks
from tests.conversion.evaluation.word_model import MODEL, prompt, variant
from tests.engine.tiny_checkpoint import write_checkpoint

BLOCK = 16
LENS = torch.tensor([1, 16, 17, 33, 100, 160, 159])


def masses(heads: int, seed: int = 0) -> Tensor:
    """Log masses of ten blocks, -inf past each row's end."""
    torch.manual_seed(seed)
    log_mass_RHB = torch.randn(len(LENS), heads, 10) * 2
    past_RB = torch.arange(10) > ((LENS - 1) // BLOCK)[:, None]
    return log_mass_RHB.masked_fill(past_RB[:, None], float("-inf"))


def top_p(value: float, heads: int) -> Tensor:
    return torch.full((len(LENS), heads), value)


def best_blocks(mass_B: Tensor, length: int, count: int) -> set[int]:
    """The first block and the last two, and then those of most mass until there are `count`."""
    last = (length - 1) // BLOCK
    chosen = {0, max(last - 1, 0), last}
    for block in sorted(range(last + 1), key=lambda b: -float(mass_B[b])):
        if len(chosen) < count:
            chosen.add(block)
    return chosen


@pytest.mark.parametrize("means", [(1.0, 1.0), (3.0, 4.2), (6.5, 2.0), (40.0, 5.0)])
def test_each_head_keeps_its_number_of_blocks_of_most_mass(means: tuple[float, float]) -> None:
    log_mass_RHB = masses(2)
    mask_RHB = FixedBlocks(means)(log_mass_RHB, top_p(0.9, 2), LENS, BLOCK)
    for row, length in enumerate(LENS.tolist()):
        for head, mean in enumerate(means):
            wanted = best_blocks(log_mass_RHB[row, head], length, ceil(mean))
            assert set(mask_RHB[row, head].nonzero().flatten().tolist()) == wanted


def test_rows_that_keep_everything_keep_everything() -> None:
    """A top_p of 1 is how a context below `dense_below` comes here."""
    mask_RHB = FixedBlocks([1.0])(masses(1), top_p(1.0, 1), LENS, BLOCK)
    assert mask_RHB.sum(-1).flatten().tolist() == [1, 1, 2, 3, 7, 10, 10]
    counted = CountedSelection()
    counted(masses(1), top_p(1.0, 1), LENS, BLOCK)
    assert counted.means() == [0.0]


def test_counting_changes_nothing_and_gives_the_mean_over_all_steps() -> None:
    counted, sums, rows = CountedSelection(), torch.zeros(3), 0
    assert counted.means() == []
    for seed in (1, 2):
        arguments = (masses(3, seed), top_p(0.7, 3), LENS, BLOCK)
        mask_RHB = counted(*arguments)
        assert torch.equal(mask_RHB, select_blocks(*arguments))
        sums, rows = sums + mask_RHB.sum(-1).sum(0), rows + len(LENS)
    assert counted.means() == pytest.approx((sums / rows).tolist(), abs=1e-4)


@torch.no_grad()
def test_a_variant_selects_by_its_own_rule(tmp_path: Path) -> None:
    """All blocks by number are the dense rule; few are not, and cost what they say."""
    folder = write_checkpoint(tmp_path, MODEL)
    served = variant(folder)
    retrieval = MODEL.retrieval_heads or ()
    ids = prompt(150, 3)

    def decoded(rules: Sequence[BlockSelection] | None) -> tuple[Tensor, list[int]]:
        one = Variant(served.decoder, served.config, served.indexers, rules)
        sequence = one.sequence(len(ids))
        sequence.prefill(ids[:140])
        return one.generate(sequence, ids[140:]), sequence.attended

    def fixed(blocks: float) -> list[FixedBlocks]:
        return [FixedBlocks([blocks] * max(len(heads), 1)) for heads in retrieval]

    hidden, attended = decoded(None)
    same, same_attended = decoded([CountedSelection() for _ in retrieval])
    assert torch.equal(hidden, same)
    assert attended == same_attended
    few, few_attended = decoded(fixed(4.0))
    assert not torch.allclose(hidden, few, atol=1e-3)
    # Pages hold 8 tokens, the last one of a row as many as there are.
    ends = [(length - 1) % 8 + 1 for length in range(141, 151)]
    heads = sum(map(len, retrieval))
    assert sorted(few_attended) == sorted([3 * 8 + end for end in ends] * heads)
    _, all_attended = decoded(fixed(1000.0))
    assert sorted(all_attended) == sorted([*range(141, 151)] * heads)
