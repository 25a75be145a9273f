"""The step `calibrate`: from a model and text to heads.json, which a person can read and edit."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from conversion.answer_loss import AnswerLoss
from conversion.attention_samples import planted_document
from conversion.calibration import NEEDLE_TOKENS, needle_document, needle_scores
from conversion.causal_check import CANDIDATES, CausalCheck, CausalResult
from conversion.convert_options import ConvertOptions
from conversion.head_roles import (
    HeadRule,
    Scores,
    ScoreSpread,
    best_units,
    choose_heads,
    heads_of,
    ranked_units,
    read_heads,
    unit_budget,
)
from conversion.parallel import Ranks
from conversion.progress_bar import progress_bar
from conversion.text_source import TextSource
from engine.model.decoder import Decoder

DETAILS = (  # of heads.json, not for config.json
    "scores_deviation",
    "scores_least",
    "scores_most",
    "scores_by_length",
)


class CalibrateStep:
    """Needle scores of one model, and the heads chosen by them."""

    def __init__(
        self,
        decoder: Decoder,
        source: TextSource,
        tokenizer: Tokenizer,
        options: ConvertOptions,
        ranks: Ranks,
        console: Console,
    ) -> None:
        self._decoder = decoder
        self._source = source
        self._tokenizer = tokenizer
        self._options = options
        self._ranks = ranks
        self._console = console
        self._lengths = options.lengths(decoder.config.max_position_embeddings)

    def run(self) -> dict[str, Any]:
        """The content of heads.json; raises ConversionError if the text is too short."""
        options, shape = self._options, self._decoder.config
        given = None  # read first: what is wrong with it should not cost the scores
        if options.heads is not None:
            given = read_heads(options.heads, shape.num_layers, shape.num_heads)
        by_length = self._scores()
        spread = ScoreSpread.of([score for scores in by_length.values() for score in scores])
        chosen = choose_heads(spread.mean, options.rule(), self._decoder.config.group_size)
        check = self._check(spread.mean) if options.causal_check else None
        rule = options.rule().describe()
        if check is not None:
            chosen = heads_of(check[0].kept, len(spread.mean))
        if given is not None:
            chosen, rule = given, {"heads": str(options.heads)}
        self._console.print(head_table(spread, chosen))
        content: dict[str, Any] = {
            "retrieval_heads": chosen,
            "chosen_by": rule,
            "text": self._source.description,
            "documents": options.documents,
            "lengths": list(self._lengths),
            "needle_tokens": NEEDLE_TOKENS,
            "scores": _rounded(spread.mean),
            "scores_deviation": _rounded(spread.deviation),
            "scores_least": _rounded(spread.least),
            "scores_most": _rounded(spread.most),
            "scores_by_length": {
                str(length): _rounded(ScoreSpread.of(scores).mean)
                for length, scores in by_length.items()
            },
        }
        if check is not None:
            content["causal_check"] = _described(*check)
        return content

    def _scores(self) -> dict[int, list[Scores]]:
        """Per length, per document. Shorter documents are beginnings of the longer ones."""
        texts = {length: self._texts(length) for length in self._lengths}
        documents = [
            needle_document(ids, self._tokenizer, NEEDLE_TOKENS, self._options.seed + number)
            for number, ids in enumerate(ids for texts in texts.values() for ids in texts)
        ]
        mine = len(range(self._ranks.rank, len(documents), self._ranks.world))
        with progress_bar(self._console, "calibrate", mine) as advance:
            scores = needle_scores(self._decoder, documents, advance, self._ranks)
        each = self._options.documents
        return {
            length: scores[each * place : each * (place + 1)]
            for place, length in enumerate(self._lengths)
        }

    def _check(self, scores: Scores) -> tuple[CausalResult, int]:
        """The causal check's outcome, and the window that it used."""
        options, config = self._options, self._decoder.config
        rule: HeadRule = options.rule()
        ranked = ranked_units(scores, rule, config.group_size)
        budget = unit_budget(ranked, rule)
        candidates = best_units(ranked, ceil(CANDIDATES * budget))
        others = ranked[len(candidates) :]
        documents = [
            planted_document(ids, self._tokenizer, 2 * 1_000_003 * options.seed + number)
            for number, ids in enumerate(self._texts(self._lengths[-1]))
        ]
        loss = AnswerLoss(
            self._decoder, documents, options.window_tokens, options.sink_tokens, self._ranks
        )
        # Elimination shrinks a round's work by about a quarter; the total is not known before.
        total = 3 + config.num_layers + 7 * len(candidates)
        with progress_bar(self._console, "causal check", total) as advance:
            check = CausalCheck(
                loss, config.num_layers, config.num_heads, advance, rule.max_kv_heads
            )
            return check.choose(candidates, budget, others), loss.window_tokens

    def _texts(self, length: int) -> list[list[int]]:
        seed = 2 * self._options.seed
        return self._source.documents(self._tokenizer, self._options.documents, length, seed)


def head_table(spread: ScoreSpread, chosen: Sequence[Sequence[int]]) -> Table:
    """Chosen heads and their scores."""
    table = Table(title="retrieval heads")
    for column in ("layer", "heads", "needle scores, with their standard deviation"):
        table.add_column(column)
    for layer, heads in enumerate(chosen):
        if heads:
            values = ", ".join(
                f"{spread.mean[layer][head]:.3f}±{spread.deviation[layer][head]:.3f}"
                for head in heads
            )
            table.add_row(str(layer), ", ".join(map(str, heads)), values)
    return table


def _described(result: CausalResult, window: int) -> dict[str, Any]:
    return {
        "window_tokens": window,
        "loss_dense": round(result.dense_loss, 5),
        "loss_local": round(result.local_loss, 5),
        "loss_kept": round(result.kept_loss, 5),
        "note": result.note,
        "candidates": [
            {
                "layer": effect.unit.layer,
                "heads": list(effect.unit.heads),
                "score": round(effect.unit.score, 5),
                "loss_added_if_taken": round(effect.taken, 5),
                "loss_saved_if_given": round(effect.given, 5),
                "kept": effect.kept,
            }
            for effect in result.effects
        ],
    }


def _rounded(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in layer] for layer in scores]
