"""What stage 2 is given: its index, its text, rows of the user, memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conversion.distil import _describe
from conversion.errors import ConversionError
from conversion.text_source import TextSource
from engine.model.decoder import Indexer
from engine.model.weights import load_decoder
from tests.conversion.tiny_distillation import OPTIONS, TinyDistillation


def test_an_index_is_known_by_its_biases_too(tiny: TinyDistillation) -> None:
    """Else a training would go on, or count as done, under another selection."""
    checkpoint, source = tiny.checkpoint, TextSource.find(tiny.folder / "text")
    assert checkpoint.config.sparse is not None
    indexers = load_decoder(checkpoint, "cpu", torch.float32).indexers

    def digest(shift: float) -> str:
        assert checkpoint.config.sparse is not None
        others = [own and replace(own, age_bias_HA=shift + _bias(own)) for own in indexers]
        about = _describe(checkpoint, checkpoint.config.sparse, others, source, OPTIONS)
        found: str = about["indexers_sha256"]
        return found

    assert digest(0.0) == digest(0.0)
    assert digest(0.0) != digest(1.0)


def _bias(indexer: Indexer) -> Tensor:
    assert indexer.age_bias_HA is not None
    return indexer.age_bias_HA


def test_the_memory_is_told_first(tiny: TinyDistillation) -> None:
    _, printed = tiny.run("told", steps=1)
    assert re.match(r"distil: about [\d.,]+ [KM]iB per device: ", printed)


def test_too_little_text(tiny: TinyDistillation) -> None:
    with pytest.raises(ConversionError, match=r"too little text: \d+ sequences .* 1004 are needed"):
        tiny.run("little", sequences=2000, validation_sequences=1000)


def test_rows_of_the_user(tiny: TinyDistillation) -> None:
    data = tiny.folder / "data.jsonl"
    rows = [{"prompt": "p" * (40 + i % 3), "response": "r" * (5 + i % 2)} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, printed = tiny.run("rows", data=data, steps=1)
    assert report["steps"] == 1
    assert "the text gave 12 of 29 sequences" in printed
    files = (tiny.folder / "rows" / "teacher").glob("*.safetensors")
    lengths = {(len(f["ids"]), len(f["top_ids"])) for f in map(load_file, files)}
    assert lengths == {(40 + i % 3 + 5 + i % 2, 5 + i % 2) for i in range(6)}
