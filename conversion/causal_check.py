"""Which heads retrieval really needs: take them away, give them back, and measure.

A needle score says where a head looks, not whether anything depends on it. Here retrieval is the
mean loss of the model at tokens that only far attention predicts (repeated needles and answers to
planted facts), and a head that does not retrieve is limited to the window, as when served. Of the
candidates, the best by score and more than will be kept,

0. a layer that loses by limiting its other heads adds those of them that matter: the heads on which
   a look-up depends early in a model need not look at the needle themselves;
1. each is measured alone: the loss when it is taken from a model that is otherwise dense, and when
   it is given to a model of which every other head is local;
2. backward elimination: with all candidates kept and the rest local, those whose loss costs least
   are dropped, in rounds, until as many are left as may be kept; if KV heads are bounded, whole KV
   heads go first, those whose candidates together cost least;
3. forward selection: a dropped one that gains more than a kept one costs takes its place;
4. one that changes nothing, in any of these measurements, only looks, and is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from conversion.head_roles import HeadUnit, best_units, heads_of, in_kv_heads

CANDIDATES = 2.0  # times as many as may be kept
LEAST_GAP = 0.05  # nats between local and dense, below which nothing can be told apart
NOTHING = 0.002  # of that gap, below which a change is none
MAX_SWAPS = 4

RetrievalLoss = Callable[[Sequence[Sequence[int]]], float]  # of retrieval heads per layer


@dataclass(frozen=True, slots=True)
class UnitEffect:
    """What one candidate changes, nats per answer token; more is more important."""

    unit: HeadUnit
    taken: float  # loss added by limiting it to the window in a dense model
    given: float  # loss saved by giving it full context in a model of local heads
    kept: bool = False


@dataclass(frozen=True, slots=True)
class CausalResult:
    """The check's outcome. `note` says why nothing was chosen by it, if so."""

    dense_loss: float  # nats per answer token, all heads with full context
    local_loss: float  # no head with full context
    kept_loss: float  # the kept heads with full context
    effects: list[UnitEffect]
    note: str | None = None

    @property
    def kept(self) -> list[HeadUnit]:
        return [effect.unit for effect in self.effects if effect.kept]


class CausalCheck:
    """Chooses units of one model by the loss that they change."""

    def __init__(
        self,
        loss: RetrievalLoss,
        layers: int,
        heads: int,
        advance: Callable[[], None] = lambda: None,
        max_kv_heads: int | None = None,
    ) -> None:
        """
        Args:
            loss: see `conversion.answer_loss`.
            heads: query heads per layer.
            advance: called after every loss.
            max_kv_heads: units of so many KV heads are kept at most.
        """
        self._layers, self._heads = layers, heads
        self._max_kv_heads = max_kv_heads
        self._loss = loss
        self._advance = advance
        self._measured: dict[tuple[tuple[int, ...], ...], float] = {}

    def choose(
        self, candidates: Sequence[HeadUnit], budget: int, others: Sequence[HeadUnit] = ()
    ) -> CausalResult:
        """At most `budget` of the candidates, which are ordered by score.

        Args:
            others: units that are candidates only if their layer loses by them.
        """
        everything = [list(range(self._heads)) for _ in range(self._layers)]
        dense, local = self._measure(everything), self._of([])
        if local - dense < LEAST_GAP:
            note = "retrieval does not depend on far attention here: heads are kept by score"
            kept = best_units(candidates, budget, self._max_kv_heads)
            effects = [UnitEffect(unit, 0.0, 0.0, kept=unit in kept) for unit in candidates]
            return CausalResult(dense, local, self._of(kept), effects, note)
        nothing = NOTHING * (local - dense)
        alone = [self._alone(unit, everything, dense, local) for unit in candidates]
        missed = [
            self._alone(unit, everything, dense, local)
            for unit in self._missed(others, everything, dense + nothing)
        ]
        alone += [effect for effect in missed if max(effect.taken, effect.given) > nothing]
        candidates = [effect.unit for effect in alone]
        left = self._swap(self._reduce(candidates, budget), candidates)
        left = self._drop_idle(left, alone, nothing)
        effects = [replace(effect, kept=effect.unit in left) for effect in alone]
        return CausalResult(dense, local, self._of(left), effects)

    def _missed(
        self, others: Sequence[HeadUnit], everything: list[list[int]], most: float
    ) -> list[HeadUnit]:
        """Of layers whose loss without all their other units is above `most`, those units."""
        found: list[HeadUnit] = []
        for layer in sorted({unit.layer for unit in others}):
            own = [unit for unit in others if unit.layer == layer]
            if self._measure(_without(everything, own)) > most:
                found += own
        return found

    def _alone(
        self, unit: HeadUnit, everything: list[list[int]], dense: float, local: float
    ) -> UnitEffect:
        taken = self._measure(_without(everything, [unit])) - dense
        return UnitEffect(unit, taken, local - self._of([unit]))

    def _reduce(self, candidates: Sequence[HeadUnit], budget: int) -> list[HeadUnit]:
        """Within the bound on KV heads, if there is one, then within the budget."""
        left = list(candidates)
        if self._max_kv_heads is not None:
            left = self._eliminate(in_kv_heads(left), self._max_kv_heads)
        return self._eliminate([[unit] for unit in left], budget)

    def _eliminate(self, parts: list[list[HeadUnit]], most: int) -> list[HeadUnit]:
        """Drop the cheapest, half of what is too much at a time: costs change as others go."""
        while len(parts) > most:
            costs = self._costs(parts)
            count = -(-(len(parts) - most) // 2)
            cheapest = sorted(range(len(parts)), key=lambda place: costs[place])[:count]
            parts = [part for place, part in enumerate(parts) if place not in cheapest]
        return [unit for part in parts for unit in part]

    def _swap(self, left: list[HeadUnit], candidates: Sequence[HeadUnit]) -> list[HeadUnit]:
        """Exchange the dropped unit that gains most for the kept one that costs least."""
        loss = self._of(left)
        for _ in range(MAX_SWAPS):
            dropped = [
                unit for unit in candidates if unit not in left and self._fits([*left, unit])
            ]
            if not dropped or not left:
                break
            gains = [loss - self._of([*left, unit]) for unit in dropped]
            best = dropped[max(range(len(dropped)), key=lambda place: gains[place])]
            wider = [*left, best]
            costs = self._costs([[unit] for unit in wider])
            weakest = min(range(len(wider)), key=lambda place: costs[place])
            changed = [unit for place, unit in enumerate(wider) if place != weakest]
            changed_loss = self._of(changed)
            if changed_loss >= loss:
                break
            left, loss = changed, changed_loss
        return left

    def _fits(self, units: Sequence[HeadUnit]) -> bool:
        return self._max_kv_heads is None or len(in_kv_heads(units)) <= self._max_kv_heads

    def _drop_idle(
        self, left: list[HeadUnit], alone: Sequence[UnitEffect], nothing: float
    ) -> list[HeadUnit]:
        """Without the units that only look; at least one unit stays."""
        costs = dict(zip(left, self._costs([[unit] for unit in left]), strict=True))
        most = {e.unit: max(e.taken, e.given) for e in alone}
        busy = [unit for unit in left if max(costs[unit], most[unit]) > nothing]
        return busy or [max(left, key=lambda unit: costs[unit])]

    def _costs(self, parts: Sequence[Sequence[HeadUnit]]) -> list[float]:
        """What the loss grows by without each part; only order and differences matter."""
        units = [unit for part in parts for unit in part]
        whole = self._of(units)
        return [self._of([unit for unit in units if unit not in part]) - whole for part in parts]

    def _of(self, units: Sequence[HeadUnit]) -> float:
        return self._measure(heads_of(units, self._layers))

    def _measure(self, retrieval_heads: Sequence[Sequence[int]]) -> float:
        """Rounds ask for the same heads again: a loss is some passes over long documents."""
        key = tuple(map(tuple, retrieval_heads))
        if key not in self._measured:
            self._measured[key] = self._loss(retrieval_heads)
            self._advance()
        return self._measured[key]


def _without(everything: list[list[int]], units: Sequence[HeadUnit]) -> list[list[int]]:
    gone = {(unit.layer, head) for unit in units for head in unit.heads}
    return [
        [head for head in heads if (layer, head) not in gone]
        for layer, heads in enumerate(everything)
    ]
