"""What an index without positions misses: the blocks that a bias for the age of keys would save.

    python -m benchmarks.index_ages [MODEL] [--tokens 4096] [--documents 14]

The index compares queries and keys before RoPE, so it cannot tell near from far. A head that mostly
looks near has its mass in a few late blocks, and an index that must gather top_p of it selects many
more. For every retrieval head of a converted MODEL, at positions anywhere and at answers: KL,
blocks and attention kept of its index; of the same projections trained on; and of projections
trained together with a bias for each range of ages. Both trainings see the same documents, others
than those that are measured, and give every head projections of its own. Nothing serves such a
bias: it says what one would be worth. Float32, on the CPU; a JSON line per head, then one of all.
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
from conversion.index_quality import IndexQuality, measure
from conversion.text_source import TextSource, load_tokenizer
from engine.embedded import embedded_model_path
from engine.model.decoder import Decoder
from engine.model.head_layout import layer_heads
from engine.model.weights import load_decoder

EDGES = (8, 32, 64, 128, 256, 512, 1024, 2048)  # tokens; ages of keys between two share a bias
KINDS = ("anywhere", "answers")
ROWS = 48  # positions of each kind in a document
MEASURED = 4  # documents
STEPS, AT_ONCE = 150, 6  # of Adam; rates fall from these to 0
RATE, BIAS_RATE = 1e-2, 0.1
SEED = 1

Head = tuple[int, int]  # layer, row among its retrieval heads


@dataclass(frozen=True, slots=True)
class Rows:
    """Some positions of one document, as a head sees them: R rows, T keys, D head_dim."""

    rows_R: Tensor
    log_attention_RT: Tensor
    q_RD: Tensor  # before RoPE, as the keys
    k_TD: Tensor


@dataclass(frozen=True, slots=True)
class AgedIndex:
    """Projections of one head, [I, D] each, and a bias per range of ages; None: without ages."""

    q_ID: Tensor
    k_ID: Tensor
    bias_A: Tensor | None = None

    def scores(self, rows: Rows) -> Tensor:
        """[R, T]; keys to come are at -inf."""
        scores_RT = (rows.q_RD @ self.q_ID.T) @ (rows.k_TD @ self.k_ID.T).T
        if self.bias_A is not None:
            age_RT = (rows.rows_R[:, None] - torch.arange(len(rows.k_TD))).clamp(min=0)
            ranges_RT = torch.bucketize(age_RT, torch.tensor(EDGES), right=True)
            scores_RT = scores_RT + self.bias_A[ranges_RT]
        return hide_future(scores_RT, rows.rows_R)

    def loss(self, rows: Rows) -> Tensor:
        """Mean KL of attention against the softmax of the scores."""
        return token_kl(rows.log_attention_RT, self.scores(rows)).mean()


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
    head = layer_heads(decoder.config, view.layer).retrieval[row]
    group = decoder.config.group_size
    return Rows(
        rows_R,
        attention_rows(view, head, rows_R, group),
        view.q_pre_THD[rows_R, head].clone(),
        view.k_pre_TND[:, head // group].clone(),
    )


def index_of(decoder: Decoder, layer: int, row: int) -> AgedIndex:
    """The index that is served."""
    indexer, heads = decoder.indexers[layer], layer_heads(decoder.config, layer)
    assert indexer is not None
    return AgedIndex(indexer.q_proj_HID[row], indexer.k_proj_HID[heads.index_row[row]])


def train(rows: Sequence[Rows], start: AgedIndex, *, ages: bool) -> AgedIndex:
    """From `start` to less KL, with a bias for ages or without."""
    q_ID, k_ID = (x.detach().clone().requires_grad_() for x in (start.q_ID, start.k_ID))
    bias_A = torch.zeros(len(EDGES) + 1, requires_grad=ages)
    index = AgedIndex(q_ID, k_ID, bias_A if ages else None)
    groups = [{"params": [q_ID, k_ID], "lr": RATE}, {"params": [bias_A], "lr": BIAS_RATE}]
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for place in torch.randperm(len(rows), generator=generator)[:AT_ONCE].tolist():
            torch.autograd.backward(index.loss(rows[place]))
        optimizer.step()
        falling.step()
    return AgedIndex(q_ID.detach(), k_ID.detach(), bias_A.detach() if ages else None)


@torch.no_grad()
def quality(rows: Sequence[Rows], index: AgedIndex, top_p: float, block: int) -> dict[str, float]:
    """Fields of `IndexQuality`, means over documents."""
    found = [
        measure(part.log_attention_RT, index.scores(part), part.rows_R, (top_p,), block)[0].values()
        for part in rows
    ]
    means = [sum(column) / len(column) for column in zip(*found, strict=True)]
    names = (field.name for field in fields(IndexQuality))
    return dict(zip(names, (round(mean, 3) for mean in means), strict=True))


def figures(
    decoder: Decoder, trained_on: Sequence[PlantedDocument], measured: Sequence[PlantedDocument]
) -> Iterator[dict[str, Any]]:
    """One record per retrieval head."""
    sparse = decoder.config.sparse
    assert sparse is not None
    training, held_out = rows_of(decoder, trained_on), rows_of(decoder, measured)
    for (layer, row), kinds in held_out.items():
        own = [part for rows in training[layer, row].values() for part in rows]
        served, heads = index_of(decoder, layer, row), layer_heads(decoder.config, layer)
        aged = train(own, served, ages=True)
        indexes = {"index": served, "trained": train(own, served, ages=False), "with_ages": aged}
        record: dict[str, Any] = {"layer": layer, "head": heads.retrieval[row]}
        for kind, rows in kinds.items():
            record[kind] = {
                name: quality(rows, index, heads.top_p[row], sparse.block_tokens)
                for name, index in indexes.items()
            }
        assert aged.bias_A is not None
        bias_A = aged.bias_A - aged.bias_A[-1]  # only differences count
        yield record | {"bias": [round(value, 2) for value in bias_A.tolist()]}


def means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over heads."""
    return {
        kind: {
            name: {
                key: round(sum(r[kind][name][key] for r in records) / len(records), 3)
                for key in values
            }
            for name, values in records[0][kind].items()
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=embedded_model_path())
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=14)
    given = parser.parse_args()
    decoder = load_decoder(given.model, "cpu", torch.float32)
    source, tokenizer = TextSource.find(None), load_tokenizer(given.model)
    documents = DocumentFeed(
        source, tokenizer, given.tokens, SEED, MEASURED + given.documents
    ).held_out()
    records = []
    for record in figures(decoder, documents[MEASURED:], documents[:MEASURED]):
        print(json.dumps(record), flush=True)
        records.append(record)
    result = {"benchmark": "index_ages", "model": given.model.name, "tokens": given.tokens}
    result |= {"documents": given.documents, "edges": EDGES, "means": means(records)}
    print(json.dumps(result | {"hardware": describe_hardware()}))


if __name__ == "__main__":
    main()
