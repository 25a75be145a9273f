"""How sharp each head's index should be, tried on text: fewest blocks that keep enough attention.

Projections are tried at every temperature (a factor on W_Q), and with adaptive top_p at several
values of it. Taken is what needs the fewest blocks among what keeps the wanted share of the true
attention on average, at answers as well as anywhere in the text and where the head looks far
(`conversion.far_rows`), so that top_p means what it says. A head that never keeps enough gets what
keeps most.

Shapes: K kinds of rows (anywhere, answers, far), C candidates, H heads, S temperatures, P top_p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument, question_rows, row_kinds
from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.far_rows import FAR, far_mass
from conversion.index_quality import selection_grid
from conversion.index_weights import GroupWeights, IndexWeights
from conversion.parallel import Ranks
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder

TRIAL_ROWS = 128  # query positions per kind and document
COUNTED = 2  # kinds of rows whose blocks are what a choice costs: those that are most of a text
COARSE = tuple(2.0 ** (step / 4) for step in range(-6, 7))  # 0.35 to 2.8
FINE = tuple(2.0 ** (step / 12) for step in range(-12, 13))  # 0.5 to 2
ADAPTIVE_TOP_P = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
# Of mass above what is wanted: other text keeps a little less than the trial's. At most half of
# what may be missing: all of the mass is kept by all blocks only.
MARGIN, MARGIN_SHARE = 0.005, 0.5
MISSING = 1e6  # cost in blocks of mass that is not kept

Place = tuple[int, int]  # layer, head


@dataclass(frozen=True, slots=True)
class Choice:
    """What one head uses, of the candidate that its group uses."""

    candidate: int
    temperature: float
    top_p: float


def try_selection(
    decoder: Decoder,
    config: ModelConfig,
    candidates: Sequence[IndexWeights],
    temperatures: Sequence[float],
    documents: Sequence[PlantedDocument],
    *,
    adaptive: bool,
    keep_far: bool,
    seed: int,
    ranks: Ranks,
    advance: Callable[[], None],
) -> dict[Place, Choice]:
    """The choice of every retrieval head.

    Args:
        config: with the sparse section that is being made; its top_p is what is wanted.
        candidates: projections of the same groups.
        adaptive: choose among ADAPTIVE_TOP_P too, not only temperatures.
        keep_far: enough is to be kept of the rows in which a head looks far, as well as of others.
        documents: every process takes its part of them.
        advance: called after each document of this process.
    """
    trial = _Trial(config, candidates, temperatures, adaptive, keep_far)
    device = next(decoder.parameters()).device
    for number in range(ranks.rank, len(documents), ranks.world):
        document, own = documents[number], seed * 1_000_003 + number
        rows = (*row_kinds(document, TRIAL_ROWS, own), question_rows(document, TRIAL_ROWS, own))
        sampled = [rows_R.to(device) for rows_R in rows]

        def watch(view: LayerView, sampled: Sequence[Tensor] = sampled) -> None:
            trial.add(view, sampled)

        watch_document(decoder, config, documents[number].ids, watch)
        advance()
    trial.share(ranks)
    return trial.choose()


def with_margin(top_p: float) -> float:
    """The share of attention that a head is to keep on the trial's text, so that it is `top_p`."""
    return top_p + min(MARGIN, MARGIN_SHARE * (1.0 - top_p))


class _Trial:
    """Kept mass and blocks, [K, C, H, S, P], summed with weights [K, H], then their means.

    Anywhere and at answers every document weighs the same, where a head looks far every row.
    """

    def __init__(
        self,
        config: ModelConfig,
        candidates: Sequence[IndexWeights],
        temperatures: Sequence[float],
        adaptive: bool,
        keep_far: bool,
    ) -> None:
        sparse = config.sparse
        assert sparse is not None
        self._config = config
        self._keep_far = keep_far
        self._block = sparse.block_tokens
        self._candidates = candidates
        self._temperatures = temperatures
        self._wanted: dict[Place, float] = {
            (layer, head): p
            for layer, heads in enumerate(sparse.retrieval_heads)
            for head, p in zip(heads, sparse.top_p[layer], strict=True)
        }
        self._rows = {place: row for row, place in enumerate(self._wanted)}
        self._top_p = {
            place: ADAPTIVE_TOP_P if adaptive else (p,) for place, p in self._wanted.items()
        }
        widest = len(ADAPTIVE_TOP_P) if adaptive else 1
        shape = (COUNTED + 1, len(candidates), len(self._rows), len(temperatures), widest)
        self._kept = torch.zeros(shape, dtype=torch.float64)
        self._blocks = torch.zeros(shape, dtype=torch.float64)
        self._weights_KH = torch.zeros(COUNTED + 1, len(self._rows), dtype=torch.float64)

    def add(self, view: LayerView, sampled: Sequence[Tensor]) -> None:
        """Tally every candidate on rows of one layer, given where the view is.

        Args:
            sampled: rows anywhere, at answers, and of questions, which only count where a head
                looks far.
        """
        every_R = torch.cat(list(sampled))
        numbers = torch.arange(len(every_R), device=every_R.device)
        counted = torch.split(numbers, [len(rows_R) for rows_R in sampled])[:COUNTED]
        for number, own in self._candidates[0].of_layer(view.layer):
            for place, head in enumerate(own.group.heads):
                row = self._rows[view.layer, head]
                log_RT = attention_rows(view, head, every_R, self._config.group_size)
                far = self._far(log_RT, every_R)
                for kind, at in enumerate((*counted, far)):
                    if not len(at):
                        continue
                    weight = 1 if kind < COUNTED else len(at)
                    self._weights_KH[kind, row] += weight
                    for candidate, weights in enumerate(self._candidates):
                        group, where = weights.groups[number], (kind, candidate, row)
                        self._add(where, weight, group, place, view, every_R[at], log_RT[at])

    def _far(self, log_RT: Tensor, rows_R: Tensor) -> Tensor:
        """Which of the rows look far, at most TRIAL_ROWS of them, evenly spread."""
        if not self._keep_far:
            return rows_R[:0]
        far = (far_mass(log_RT, rows_R, self._block) > FAR).nonzero()[:, 0]
        return far[:: max(1, -(-len(far) // TRIAL_ROWS))]

    def _add(
        self,
        where: tuple[int, int, int],
        weight: int,
        group: GroupWeights,
        place: int,
        view: LayerView,
        rows_R: Tensor,
        log_RT: Tensor,
    ) -> None:
        top_p = self._top_p[view.layer, group.group.heads[place]]
        scores_RT = group.scores(place, view, rows_R, self._block)
        grid = selection_grid(log_RT, scores_RT, rows_R, self._temperatures, top_p, self._block)
        self._kept[where] += weight * grid.kept_SP
        self._blocks[where] += weight * grid.blocks_SP

    def share(self, ranks: Ranks) -> None:
        """Means over the documents of all processes; where there was no row, nothing is lost."""
        weights_K1H11 = ranks.summed(self._weights_KH)[:, None, :, None, None]
        self._kept = (ranks.summed(self._kept) / weights_K1H11).nan_to_num(1.0)
        self._blocks = ranks.summed(self._blocks) / weights_K1H11

    def choose(self) -> dict[Place, Choice]:
        wanted = [with_margin(top_p) for top_p in self._wanted.values()]
        wanted_H11 = torch.tensor(wanted, dtype=torch.float64)[:, None, None]
        missing = (wanted_H11 - self._kept.amin(0)).clamp(min=0)  # of the worse kind of rows
        missing = missing.where(missing > 1e-9, 0.0)
        cost_CHX = (self._blocks[:COUNTED].mean(0) + MISSING * missing).flatten(2)
        least_CH, where_CH = cost_CHX.min(-1)
        choices: dict[Place, Choice] = {}
        for group in self._candidates[0].groups:
            rows = [self._rows[place] for place in group.group.places]
            best = int(least_CH[:, rows].sum(1).argmin())
            for row, place in zip(rows, group.group.places, strict=True):
                step, rank = divmod(int(where_CH[best, row]), self._kept.shape[-1])
                choices[place] = Choice(best, self._temperatures[step], self._top_p[place][rank])
        return choices
