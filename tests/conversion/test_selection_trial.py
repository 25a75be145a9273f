"""Temperatures and top_p are the cheapest that keep enough, on the documents they are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument, row_kinds
from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.far_rows import far_mass
from conversion.index_quality import IndexQuality, measure
from conversion.index_weights import IndexWeights
from conversion.indexer_fit import IndexerFit
from conversion.parallel import Ranks
from conversion.selection_trial import COARSE, MARGIN, Choice, try_selection, with_margin
from tests.conversion.tiny_training import HEADS, TOKENS, Tiny, documents

WANTED = 0.6  # of the mass: random projections must scan most blocks for more


def tried(
    tiny: Tiny,
    candidates: list[IndexWeights],
    *,
    adaptive: bool,
    keep_far: bool = True,
    trial: Sequence[PlantedDocument] | None = None,
) -> dict[tuple[int, int], Choice]:
    return try_selection(
        tiny.decoder,
        tiny.config,
        candidates,
        COARSE,
        trial or documents(2),
        adaptive=adaptive,
        keep_far=keep_far,
        seed=0,
        ranks=Ranks(),
        advance=lambda: None,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    made = Tiny.make(tmp_path)
    assert made.config.sparse is not None
    top_p = tuple(tuple(WANTED for _ in heads) for heads in HEADS)
    made.config = replace(made.config, sparse=replace(made.config.sparse, top_p=top_p))
    return made


def all_places(tiny: Tiny) -> list[tuple[int, int]]:
    return [place for group in tiny.start.groups for place in group.group.places]


def by_hand(
    tiny: Tiny, weights: IndexWeights, place: tuple[int, int], setting: Choice
) -> tuple[float, float]:
    """Kept mass of the worse kind of rows, and blocks, at a head's setting."""
    layer, head = place
    found: list[list[IndexQuality]] = [[], []]
    group = next(g for g in weights.groups if place in g.group.places)

    def look(document: PlantedDocument, number: int) -> None:
        kinds = row_kinds(document, 128, number)

        def watch(view: LayerView) -> None:
            if view.layer != layer:
                return
            for kind, rows_R in enumerate(kinds):
                log_RT = attention_rows(view, head, rows_R, tiny.config.group_size)
                scores_RT = group.scores(group.group.heads.index(head), view, rows_R, 16)
                scores_RT = scores_RT * setting.temperature
                found[kind] += measure(log_RT, scores_RT, rows_R, (setting.top_p,), 16)

        watch_document(tiny.decoder, tiny.config, document.ids, watch)

    for number, document in enumerate(documents(2)):
        look(document, number)
    kept, blocks = (
        [sum(getattr(q, name) for q in kind) / len(kind) for kind in found]
        for name in ("kept_mass", "blocks")
    )
    return min(kept), sum(blocks) / 2


@pytest.mark.parametrize("adaptive", [False, True], ids=["one top_p", "adaptive"])
def test_the_choice_is_the_cheapest_that_keeps_enough(
    adaptive: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.selection_trial.ADAPTIVE_TOP_P", (0.4, 0.6, 0.8))
    choices = tried(tiny, [tiny.start], adaptive=adaptive)
    assert sorted(choices) == all_places(tiny)
    values = (0.4, 0.6, 0.8) if adaptive else (WANTED,)
    for place in ((1, 2), (2, 5)):
        every = {
            (temperature, p): by_hand(tiny, tiny.start, place, Choice(0, temperature, p))
            for temperature in COARSE[::2]
            for p in values
        }
        kept, blocks = by_hand(tiny, tiny.start, place, choices[place])
        assert kept >= WANTED + MARGIN - 1e-6
        allowed = [cost for mass, cost in every.values() if mass >= WANTED + MARGIN]
        assert allowed
        assert blocks <= min(allowed) + 1e-6
        assert len({cost for _, cost in every.values()}) > 1
        assert choices[place].top_p in values


@pytest.mark.parametrize(
    ("top_p", "wanted"), [(0.6, 0.605), (0.99, 0.995), (0.995, 0.9975), (1.0, 1.0)]
)
def test_no_head_is_asked_to_keep_everything_unless_top_p_is_one(
    top_p: float, wanted: float
) -> None:
    """Only all blocks keep all of the mass: the bluntest index would be taken for every head."""
    assert with_margin(top_p) == pytest.approx(wanted)


def test_a_head_that_never_keeps_enough_gets_what_keeps_most(tiny: Tiny) -> None:
    """Scores this sharp put all index mass into a block or two, at every temperature."""
    sharp = tiny.start.scaled(dict.fromkeys(all_places(tiny), 40.0))
    choices = tried(tiny, [sharp], adaptive=False)
    most = [by_hand(tiny, sharp, (1, 1), Choice(0, step, WANTED))[0] for step in COARSE]
    kept, _ = by_hand(tiny, sharp, (1, 1), choices[1, 1])
    assert max(most) < WANTED + MARGIN
    assert kept == pytest.approx(max(most))


def test_of_several_candidates_every_group_takes_its_own_best(tiny: Tiny) -> None:
    """Blunt projections for the heads of one layer, and the same for those of the other."""
    candidates = [
        tiny.start.scaled({place: 1e-3 if place[0] == blunt else 1.0 for place in all_places(tiny)})
        for blunt in (1, 2)
    ]
    choices = tried(tiny, candidates, adaptive=False)
    alone = [tried(tiny, [candidate], adaptive=False) for candidate in candidates]
    for place, choice in choices.items():
        own = [
            by_hand(tiny, weights, place, found[place])
            for weights, found in zip(candidates, alone, strict=True)
        ]
        enough = [blocks if mass >= WANTED + MARGIN else 1e6 - mass for mass, blocks in own]
        assert enough[choice.candidate] == min(enough)


def test_fitted_weights_carry_their_temperatures(tiny: Tiny) -> None:
    fit = IndexerFit(tiny.decoder, tiny.config)
    closed = fit.closed_form(documents(2), documents(1))
    again = fit.sharpened(tiny.start, closed.settings, documents(1), adaptive=True)
    for before, after in zip(tiny.start.groups, again.weights.groups, strict=True):
        for place, old, new in zip(before.group.places, before.w_q_GID, after.w_q_GID, strict=True):
            torch.testing.assert_close(new, old * again.settings[place].temperature)
        assert torch.equal(before.w_k_ID, after.w_k_ID)
    section = fit.with_top_p(again)
    assert section.top_p[1] == tuple(again.settings[1, head].top_p for head in HEADS[1])
    lines = fit.quality(again, closed, documents(1))
    assert [(line.layer, line.head) for line in lines] == sorted(closed.settings)
    for line in lines:
        assert line.answers.kl > 0
        assert [point.top_p for point in line.curve] == sorted(p.top_p for p in line.curve)
        assert [p.anywhere.kept_mass for p in line.curve] == sorted(
            p.anywhere.kept_mass for p in line.curve
        )
        assert line.closed_form.top_p == closed.settings[line.layer, line.head].top_p


def far_kept(tiny: Tiny, place: tuple[int, int], setting: Choice, far: float) -> float:
    """Mean mass kept at all sampled rows whose attention is far by more than `far`."""
    layer, head = place
    group = next(g for g in tiny.start.groups if place in g.group.places)
    kept: list[float] = []

    def look(rows_R: Tensor, view: LayerView) -> None:
        if view.layer != layer:
            return
        log_RT = attention_rows(view, head, rows_R, tiny.config.group_size)
        rows_R = rows_R[far_mass(log_RT, rows_R, 16) > far]
        for row in torch.split(rows_R, 1):
            one_1T = attention_rows(view, head, row, tiny.config.group_size)
            scores_1T = group.scores(group.group.heads.index(head), view, row, 16)
            quality = measure(one_1T, scores_1T * setting.temperature, row, (setting.top_p,), 16)
            kept.append(quality[0].kept_mass)

    for number, document in enumerate(documents(2)):
        rows_R = torch.cat(row_kinds(document, 128, number))
        watch_document(tiny.decoder, tiny.config, document.ids, partial(look, rows_R))
    assert len(kept) > 10
    return sum(kept) / len(kept)


@pytest.mark.parametrize(("place", "far"), [((1, 2), 0.75), ((1, 4), 0.8)])
def test_enough_is_kept_of_the_few_rows_that_look_far(
    place: tuple[int, int], far: float, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all rows keep on the average hides what those few lose."""
    wanted = 0.7
    assert tiny.config.sparse is not None
    top_p = tuple(tuple(wanted for _ in heads) for heads in HEADS)
    tiny.config = replace(tiny.config, sparse=replace(tiny.config.sparse, top_p=top_p))
    monkeypatch.setattr("conversion.selection_trial.FAR", far)
    without = tried(tiny, [tiny.start], adaptive=False, keep_far=False)[place]
    choice = tried(tiny, [tiny.start], adaptive=False)[place]
    assert far_kept(tiny, place, without, far) < wanted + MARGIN
    assert far_kept(tiny, place, choice, far) >= wanted + MARGIN - 1e-6
    assert by_hand(tiny, tiny.start, place, without)[0] >= wanted + MARGIN - 1e-6


def test_questions_are_among_the_rows_that_may_look_far(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked after the first answer, which is neither an answer nor anywhere in the text."""
    seen: list[int] = []

    def noting(log_RT: Tensor, rows_R: Tensor, block_tokens: int) -> Tensor:
        seen.extend(rows_R.tolist())
        return far_mass(log_RT, rows_R, block_tokens)

    (needle,) = documents(1)
    asking = replace(needle, answers=[150, 151, 170, 171])
    monkeypatch.setattr("conversion.selection_trial.far_mass", noting)
    tried(tiny, [tiny.start], adaptive=False, trial=[asking])
    assert set(range(150, 172)) <= set(seen)
    assert max(seen) == 171
    assert min(seen) >= TOKENS // 4
