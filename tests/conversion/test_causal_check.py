"""Choosing heads by what retrieval loses, on made-up losses and on a real model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from conversion.answer_loss import AnswerLoss
from conversion.attention_samples import PlantedDocument, planted_document
from conversion.causal_check import CausalCheck
from conversion.document_attention import watch_document
from conversion.head_roles import HeadUnit
from engine.model.config import SparseAttentionConfig
from engine.model.dense_attention import DenseAttention
from engine.model.weights import load_decoder
from tests.engine.byte_tokenizer import byte_tokenizer
from tests.engine.model.tiny_models import make_checkpoint

LAYERS, HEADS = 2, 4


@dataclass
class MadeUpLoss:
    """A loss that falls by a worth for every head that has full context, down to 0 or so.

    `twins` do the same thing: having both is worth no more than having one.
    """

    worth: dict[tuple[int, int], float]
    twins: tuple[tuple[int, int], tuple[int, int]] | None = None
    asked: list[Sequence[Sequence[int]]] = field(default_factory=list)

    def __call__(self, retrieval_heads: Sequence[Sequence[int]]) -> float:
        self.asked.append(retrieval_heads)
        kept = {(layer, head) for layer, heads in enumerate(retrieval_heads) for head in heads}
        saved = sum(worth for place, worth in self.worth.items() if place in kept)
        if self.twins is not None and kept.issuperset(self.twins):
            saved -= self.worth[self.twins[1]]
        return 5.0 - saved


def units(*places: tuple[int, int]) -> list[HeadUnit]:
    """Candidates, the best by score first."""
    return [
        HeadUnit(layer, head // 2, (head,), 1.0 / (1 + number))
        for number, (layer, head) in enumerate(places)
    ]


def kept_places(loss: MadeUpLoss, candidates: list[HeadUnit], budget: int) -> set[tuple[int, int]]:
    result = CausalCheck(loss, LAYERS, HEADS).choose(candidates, budget)
    assert result.note is None
    assert len(result.effects) == len(candidates)
    return {(unit.layer, unit.heads[0]) for unit in result.kept}


def test_a_head_that_matters_is_not_lost_to_one_that_only_looks() -> None:
    """The best by score changes nothing; the last by score matters most."""
    loss = MadeUpLoss({(0, 1): 0.5, (1, 2): 1.0, (1, 3): 2.0})
    candidates = units((0, 0), (0, 1), (1, 2), (1, 3))
    assert kept_places(loss, candidates, 2) == {(1, 2), (1, 3)}
    assert kept_places(loss, candidates, 4) == {(0, 1), (1, 2), (1, 3)}


def test_a_head_with_a_low_score_is_found_by_its_layer() -> None:
    """(0, 3) is no candidate and matters most; layer 1 loses nothing by its others."""
    loss = MadeUpLoss({(0, 3): 2.0, (1, 2): 1.0, (1, 3): 0.5})
    candidates, others = units((1, 2), (1, 3)), units((0, 0), (0, 3), (1, 0), (1, 1))
    result = CausalCheck(loss, LAYERS, HEADS).choose(candidates, 2, others)
    assert {(unit.layer, unit.heads[0]) for unit in result.kept} == {(0, 3), (1, 2)}
    assert [effect.unit for effect in result.effects] == [*candidates, others[1]]
    one_gone = [asked for asked in loss.asked if sum(map(len, asked)) == LAYERS * HEADS - 1]
    assert all(0 in asked[1] and 1 in asked[1] for asked in one_gone), "(1, 0), (1, 1) not alone"


def test_of_two_heads_that_do_the_same_one_is_kept() -> None:
    """Either alone looks dispensable, both together are not: what single masking cannot see."""
    twins = ((0, 0), (1, 1))
    loss = MadeUpLoss({(0, 0): 2.0, (1, 1): 2.0, (0, 2): 0.5, (1, 3): 0.1}, twins)
    kept = kept_places(loss, units((0, 0), (1, 1), (0, 2), (1, 3)), 2)
    assert (0, 2) in kept
    assert len(kept & set(twins)) == 1


def test_a_head_that_was_dropped_with_others_comes_back() -> None:
    """Elimination drops both twins in one round, as neither costs anything alone."""
    twins = ((0, 0), (1, 1))
    loss = MadeUpLoss({(0, 0): 2.0, (1, 1): 2.0, (0, 2): 0.5, (0, 3): 0.4, (1, 3): 0.3}, twins)
    kept = kept_places(loss, units((0, 0), (1, 1), (0, 2), (0, 3), (1, 3)), 2)
    assert len(kept & set(twins)) == 1
    assert (0, 2) in kept


def test_a_bound_on_kv_heads_keeps_those_that_matter_together() -> None:
    """The best two heads lie apart; of one KV head, (1, 2) and (1, 3) together save more."""
    loss = MadeUpLoss({(0, 0): 1.0, (0, 2): 0.9, (1, 2): 0.8, (1, 3): 0.7})
    candidates = units((0, 0), (0, 2), (1, 2), (1, 3))
    for budget, most, kept in (
        (2, 1, {(1, 2), (1, 3)}),
        (1, 1, {(1, 2)}),
        (3, 2, {(0, 0), (1, 2), (1, 3)}),
        (4, 4, {(0, 0), (0, 2), (1, 2), (1, 3)}),
    ):
        result = CausalCheck(loss, LAYERS, HEADS, max_kv_heads=most).choose(candidates, budget)
        assert {(unit.layer, unit.heads[0]) for unit in result.kept} == kept


def test_without_retrieval_the_bound_on_kv_heads_holds_too() -> None:
    candidates = units((0, 0), (1, 2), (0, 1))
    check = CausalCheck(MadeUpLoss({(0, 1): 0.01}), LAYERS, HEADS, max_kv_heads=1)
    assert [unit.heads for unit in check.choose(candidates, 2).kept] == [(0,), (1,)]


def test_effects_are_the_losses_of_taking_and_giving() -> None:
    loss = MadeUpLoss({(0, 1): 0.5, (1, 2): 1.0})
    result = CausalCheck(loss, LAYERS, HEADS).choose(units((1, 2), (0, 1), (0, 0)), 2)
    assert (result.dense_loss, result.local_loss, result.kept_loss) == (3.5, 5.0, 3.5)
    assert [(e.taken, e.given, e.kept) for e in result.effects] == [
        (1.0, 1.0, True),
        (0.5, 0.5, True),
        (0.0, 0.0, False),
    ]


def test_groups_of_heads_are_taken_and_given_together() -> None:
    loss = MadeUpLoss({(0, 2): 1.0, (0, 3): 1.0, (1, 0): 1.5})
    groups = [HeadUnit(1, 0, (0, 1), 0.9), HeadUnit(0, 1, (2, 3), 0.1)]
    result = CausalCheck(loss, LAYERS, HEADS).choose(groups, 1)
    assert result.kept == [groups[1]]
    for heads in loss.asked:
        assert {2, 3} <= set(heads[0]) or not {2, 3} & set(heads[0])


def test_a_model_that_does_not_retrieve_keeps_its_heads_by_score() -> None:
    loss = MadeUpLoss({(0, 1): 0.01})
    result = CausalCheck(loss, LAYERS, HEADS).choose(units((0, 0), (0, 1)), 1)
    assert result.note is not None
    assert [unit.heads for unit in result.kept] == [(0,)]
    assert len(loss.asked) == 3, "nothing more was measured than needed to see it"


def test_every_measurement_is_reported() -> None:
    loss, count = MadeUpLoss({(0, 1): 0.5, (1, 2): 1.0}), [0]

    def advance() -> None:
        count[0] += 1

    CausalCheck(loss, LAYERS, HEADS, advance).choose(units((0, 0), (0, 1), (1, 2)), 1)
    assert count[0] == len(loss.asked)
    assert len(set(map(str, loss.asked))) == len(loss.asked), "none is made twice"


@pytest.fixture
def two_documents() -> list[PlantedDocument]:
    ids = torch.randint(64, 320, (2, 240), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        planted_document(ids[0], byte_tokenizer(320), 1),
        planted_document(ids[1][:200], byte_tokenizer(320), 3),
    ]


def test_the_loss_is_the_models_own_at_answers(
    two_documents: list[PlantedDocument], tmp_path: Path
) -> None:
    make_checkpoint("qwen3", tmp_path)
    decoder = load_decoder(tmp_path, "cpu", torch.float32)
    loss = AnswerLoss(decoder, two_documents, window_tokens=4096, sink_tokens=2)
    assert loss.window_tokens == 25  # an eighth of the shorter one
    every = [list(range(6))] * 3
    total, count = 0.0, 0
    for document in two_documents:
        ids = torch.tensor(document.ids)
        with torch.no_grad():
            hidden = decoder(ids, torch.arange(len(ids)), DenseAttention())
            at = torch.tensor(document.answers)
            total += float(cross_entropy(decoder.logits(hidden[at]), ids[at + 1], reduction="sum"))
        count += len(at)
    assert loss(every) == pytest.approx(total / count, rel=1e-4)

    sparse = SparseAttentionConfig(
        retrieval_heads=((), (1, 2), ()), window_tokens=25, sink_tokens=2, index_dim=None
    )
    config, total = replace(decoder.config, sparse=sparse), 0.0
    for document in two_documents:
        hidden = watch_document(decoder, config, document.ids, lambda view: None)
        with torch.no_grad():
            logits = decoder.logits(hidden[document.answers])
        targets = torch.tensor(document.ids)[torch.tensor(document.answers) + 1]
        total += float(cross_entropy(logits, targets, reduction="sum"))
    local = loss([[], [1, 2], []])
    assert local == pytest.approx(total / count, rel=1e-4)
    assert abs(local - loss(every)) > 1e-3
