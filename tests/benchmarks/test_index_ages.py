"""Both fits of a tiny model are from the same documents, and differ by the bias alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks.index_ages import NAMES, fitted, means, records
from conversion.document_feed import DocumentFeed
from conversion.fit_options import FitOptions
from conversion.index_quality import IndexQuality
from conversion.text_source import TextSource, load_tokenizer
from engine.model.weights import load_decoder
from tests.engine.model.tiny_models import make_checkpoint

OPTIONS = FitOptions(
    steps=1, queries=16, moment_documents=1, trial_documents=1, quality_documents=1
)
SECTION = {"retrieval_heads": [[], [1], [2, 4]], "index_dim": 4, "block_tokens": 16, "top_p": 0.7}


def test_a_record_per_head_has_both_fits_before_and_after_the_steps(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "model", section=SECTION)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"value_{i} = {i * i}\n" for i in range(800)))
    decoder = load_decoder(tmp_path / "model", "cpu", torch.float32)
    tokenizer = load_tokenizer(tmp_path / "model")
    feed = DocumentFeed(TextSource.find(text), tokenizer, 300, 1, OPTIONS.held_out)
    found = {name: fitted(decoder, feed, OPTIONS, ages=ages) for ages, name in NAMES.items()}
    heads = list(records(found))
    assert [(head["layer"], head["head"]) for head in heads] == [(1, 1), (2, 2), (2, 4)]
    assert all(head.age_bias is None for head in found["plain"])
    assert all(head.age_bias and any(head.age_bias) for head in found["with_ages"])
    for head in heads:
        for kind in ("anywhere", "answers"):
            own = head[kind]
            assert list(own) == [
                f"{name}_{made}" for name in NAMES.values() for made in ("closed_form", "trained")
            ]
            needed = {quality["teacher_blocks"] for quality in own.values()}
            assert len(needed) == 1, "the same documents and the same rows"
            assert len({quality["kl"] for quality in own.values()}) == 4
    mean = means(heads)["answers"]["with_ages_trained"]
    assert list(mean) == [field.name for field in fields(IndexQuality)]
    values = [head["answers"]["with_ages_trained"]["kl"] for head in heads]
    assert mean["kl"] == pytest.approx(sum(values) / 3, abs=1e-3)
