"""What a bias for the age of blocks is worth to an index: the same fit with it and without.

    python -m benchmarks.index_ages [MODEL] [--tokens 4096] [--steps 60] [--documents 2]

The index compares queries and keys before RoPE, so it cannot tell near from far. A head that mostly
looks near has its mass in a few late blocks, and an index that must gather top_p of it selects many
more. For every retrieval head of a converted MODEL the fit of `rtpurbo convert` is done twice, from
the same documents: attention kept, blocks selected, blocks that the true attention needs and KL, of
the closed form and after the steps, at positions anywhere and at answers, on as many documents as
temperatures are chosen on. Float32, on the CPU; a JSON line per head, then one of the means.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from benchmarks.hardware import describe_hardware
from conversion.document_feed import DocumentFeed
from conversion.fit_options import FitOptions
from conversion.fit_step import FitStep
from conversion.index_quality import IndexQuality
from conversion.indexer_fit import HeadQuality
from conversion.parallel import Ranks
from conversion.text_source import TextSource, load_tokenizer
from engine.embedded import embedded_model_path
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder

NAMES = {False: "plain", True: "with_ages"}
KINDS = ("anywhere", "answers")
RATE = 1e-2  # of small models
SEED = 1


def fitted(
    decoder: Decoder, feed: DocumentFeed, options: FitOptions, *, ages: bool
) -> list[HeadQuality]:
    """Every retrieval head of the model, on documents that the fit has not seen."""
    sparse = decoder.config.sparse
    assert sparse is not None
    config = replace(decoder.config, sparse=replace(sparse, index_age_bias=ages))
    with TemporaryDirectory() as folder:
        step = FitStep(
            decoder, config, feed, options, Path(folder), SEED, Ranks(), Console(stderr=True)
        )
        return step.run().quality


def records(found: Mapping[str, Sequence[HeadQuality]]) -> Iterator[dict[str, Any]]:
    """A record per head, of what `fitted` has found by name."""
    for heads in zip(*found.values(), strict=True):
        own = dict(zip(found, heads, strict=True))
        record: dict[str, Any] = {"layer": heads[0].layer, "head": heads[0].head}
        for kind in KINDS:
            record[kind] = {
                f"{name}_{made}": _rounded(quality)
                for name, head in own.items()
                for made, quality in (
                    ("closed_form", getattr(head.closed_form, kind)),
                    ("trained", getattr(head, kind)),
                )
            }
        yield record


def _rounded(quality: IndexQuality) -> dict[str, float]:
    return {key: round(value, 3) for key, value in asdict(quality).items()}


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
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--documents", type=int, default=2)
    given = parser.parse_args()
    options = FitOptions(
        steps=given.steps,
        learning_rate=RATE,
        trial_documents=given.documents,
        quality_documents=given.documents,
    )
    decoder = load_decoder(given.model, "cpu", torch.float32)
    tokenizer = load_tokenizer(given.model)
    feed = DocumentFeed(TextSource.find(None), tokenizer, given.tokens, SEED, options.held_out)
    found = {name: fitted(decoder, feed, options, ages=ages) for ages, name in NAMES.items()}
    heads = list(records(found))
    for record in heads:
        print(json.dumps(record))
    result = {"benchmark": "index_ages", "model": given.model.name, "tokens": given.tokens}
    result |= {"options": asdict(options), "means": means(heads)}
    print(json.dumps(result | {"hardware": describe_hardware()}))


if __name__ == "__main__":
    main()
