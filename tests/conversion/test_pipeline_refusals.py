"""What a conversion refuses, each in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conversion.errors import ConversionError
from conversion.pipeline import ConvertOptions, ConvertRun, convert
from engine.model.checkpoint import preflight
from tests.conversion.pipeline_case import QUIET, refusal
from tests.engine.model.tiny_models import make_checkpoint


@pytest.mark.usefixtures("no_pictures")
def test_what_cannot_be_converted_is_said_in_one_line(
    tmp_path: Path, options: ConvertOptions
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    make_checkpoint("qwen3", dense)
    assert "no such" in refusal(tmp_path / "nowhere", out, options)
    assert "no such file or folder" in refusal(dense, out, replace(options, data=tmp_path / "x"))
    long = replace(options, documents=500)
    assert "too little text" in refusal(dense, tmp_path / "long", long)
    short = replace(options, document_tokens=50)
    assert "too short" in refusal(dense, tmp_path / "short", short)
    convert(dense, out, options, QUIET)
    assert "exists already" in refusal(dense, out, options)
    other = tmp_path / "other"
    run = ConvertRun(preflight(dense), other, options, QUIET)
    run.open()
    assert "another model" in refusal(dense, other, replace(options, index_dim=8))
    assert "other options" in refusal(dense, other, replace(options, index_age_bias=False))
    config = json.loads((dense / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (dense / "config.json").write_text(json.dumps(config))
    assert "config.json" in refusal(dense, tmp_path / "new", options)


@pytest.mark.parametrize(
    "change",
    [
        {"heads_share": 0.0},
        {"top_p": 1.5},
        {"block_tokens": 48},
        {"sink_tokens": 65},
        {"window_tokens": 0},
    ],
    ids=str,
)
def test_impossible_options_are_named(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConversionError, match=name.replace("heads_share", "heads share")):
        ConvertOptions(**change)
