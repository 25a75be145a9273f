"""What an index without positions misses: the blocks that a bias for the age of keys would save.

    python -m benchmarks.index_ages MODEL [--tokens 4096] [--documents 3]

The index compares queries and keys before RoPE, so it cannot tell near from far. A head that mostly
looks near has its mass in a few late blocks, and an index that must gather top_p of it selects many
more. For every retrieval head of a converted MODEL, at positions anywhere and at answers: KL,
blocks and attention kept of the index as it is, and of the same scores times a temperature plus a
bias for each range of ages, both fitted by gradient to KL on as many other documents. Nothing
serves such a bias: it says what one would be worth. Float32, on the CPU; one JSON line per head,
then one of all.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import describe_hardware
from conversion.attention_samples import PlantedDocument, row_kinds
from conversion.document_attention import LayerView, attention_rows, hide_future, watch_document
from conversion.document_feed import DocumentFeed
from conversion.index_loss import token_kl
from conversion.index_quality import IndexQuality
from conversion.index_quality import measure as measure_index
from conversion.text_source import TextSource, load_tokenizer
from engine.model.decoder import Decoder
from engine.model.head_layout import layer_heads
from engine.model.weights import load_decoder

EDGES = (8, 32, 64, 128, 256, 512, 1024, 2048)  # tokens; ages of keys between two share a bias
KINDS = ("anywhere", "answers")
ROWS = 48  # positions of each kind in a document
STEPS, RATE = 60, 0.15  # of Adam
SEED = 1

Head = tuple[int, int]  # layer, row among its retrieval heads


@dataclass(frozen=True, slots=True)
class Rows:
    """Some positions of one document, as a head and its index see them: R rows, T keys."""

    rows_R: Tensor
    log_attention_RT: Tensor
    scores_RT: Tensor

    def aged(self, bias_A: Tensor, temperature: Tensor) -> Tensor:
        """The scores with a bias for every range of ages; keys to come stay at -inf."""
        age_RT = (self.rows_R[:, None] - torch.arange(self.scores_RT.shape[1])).clamp(min=0)
        range_RT = torch.bucketize(age_RT, torch.tensor(EDGES), right=True)
        past_RT = self.scores_RT.isfinite()
        # Where a score is -inf a gradient of the temperature would be NaN.
        finite_RT = self.scores_RT.masked_fill(~past_RT, 0) * temperature + bias_A[range_RT]
        return finite_RT.masked_fill(~past_RT, float("-inf"))


def rows_of(
    decoder: Decoder, documents: Sequence[PlantedDocument]
) -> dict[Head, dict[str, list[Rows]]]:
    """For every retrieval head, by kind of position, an entry per document."""
    found: dict[Head, dict[str, list[Rows]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        kinds = dict(zip(KINDS, row_kinds(document, ROWS, SEED), strict=True))

        def watch(view: LayerView, kinds: dict[str, Tensor] = kinds) -> None:
            for row in range(len(layer_heads(decoder.config, view.layer).retrieval)):
                for kind, rows_R in kinds.items():
                    found[view.layer, row][kind].append(_rows(decoder, view, row, rows_R))

        watch_document(decoder, decoder.config, document.ids, watch)
    return found


def _rows(decoder: Decoder, view: LayerView, row: int, rows_R: Tensor) -> Rows:
    indexer, heads = decoder.indexers[view.layer], layer_heads(decoder.config, view.layer)
    assert indexer is not None
    head, group = heads.retrieval[row], decoder.config.group_size
    qi_RI = view.q_pre_THD[rows_R, head] @ indexer.q_proj_HID[row].T
    keys_TI = view.k_pre_TND[:, head // group] @ indexer.k_proj_HID[heads.index_row[row]].T
    scores_RT = hide_future(qi_RI @ keys_TI.T, rows_R)
    return Rows(rows_R, attention_rows(view, head, rows_R, group), scores_RT)


def fit(rows: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """Bias per range of ages, and temperature, of least KL."""
    bias_A = torch.zeros(len(EDGES) + 1, requires_grad=True)
    log_temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([bias_A, log_temperature], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in rows:
            aged_RT = part.aged(bias_A, log_temperature.exp())
            torch.autograd.backward(token_kl(part.log_attention_RT, aged_RT).mean())
        optimizer.step()
    return (bias_A - bias_A[-1]).detach(), log_temperature.detach().exp()


def quality(rows: Sequence[Rows], scores: Sequence[Tensor], top_p: float, block: int) -> Any:
    """Means over documents, as JSON."""
    found = [
        measure_index(part.log_attention_RT, scores_RT, part.rows_R, (top_p,), block)[0].values()
        for part, scores_RT in zip(rows, scores, strict=True)
    ]
    means = [sum(column) / len(column) for column in zip(*found, strict=True)]
    names = (field.name for field in fields(IndexQuality))
    return dict(zip(names, (round(mean, 3) for mean in means), strict=True))


def figures(
    decoder: Decoder, fitted: Sequence[PlantedDocument], measured: Sequence[PlantedDocument]
) -> Iterator[dict[str, Any]]:
    """One record per retrieval head."""
    sparse = decoder.config.sparse
    assert sparse is not None
    training, held_out = rows_of(decoder, fitted), rows_of(decoder, measured)
    for (layer, row), kinds in held_out.items():
        bias_A, temperature = fit([part for own in training[layer, row].values() for part in own])
        heads, block = layer_heads(decoder.config, layer), sparse.block_tokens
        record: dict[str, Any] = {"layer": layer, "head": heads.retrieval[row]}
        for kind, rows in kinds.items():
            plain = [part.scores_RT for part in rows]
            aged = [part.aged(bias_A, temperature) for part in rows]
            record[kind] = {
                name: quality(rows, scores, heads.top_p[row], block)
                for name, scores in (("index", plain), ("with_ages", aged))
            }
        record["bias"] = [round(value, 2) for value in bias_A.tolist()]
        yield record | {"temperature": round(float(temperature), 3)}


def means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over heads."""
    return {
        kind: {
            name: {
                key: round(sum(r[kind][name][key] for r in records) / len(records), 3)
                for key in records[0][kind][name]
            }
            for name in ("index", "with_ages")
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=3)
    given = parser.parse_args()
    decoder = load_decoder(given.model, "cpu", torch.float32)
    source, tokenizer = TextSource.find(None), load_tokenizer(given.model)
    feed = DocumentFeed(source, tokenizer, given.tokens, SEED, 2 * given.documents)
    documents = feed.held_out()
    records = []
    for record in figures(decoder, documents[: given.documents], documents[given.documents :]):
        print(json.dumps(record), flush=True)
        records.append(record)
    result = {"benchmark": "index_ages", "model": given.model.name, "tokens": given.tokens}
    result |= {"documents": given.documents, "edges": EDGES, "means": means(records)}
    print(json.dumps(result | {"hardware": describe_hardware()}))


if __name__ == "__main__":
    main()
