"""The state of a conversion: a model is known by its weights, a fit by its heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from conversion.errors import ConversionError
from conversion.fit_options import FitOptions
from conversion.pipeline import ConvertOptions, ConvertRun
from conversion.state import model_digest, read_json, write_json
from engine.model.checkpoint import preflight
from tests.engine.model.tiny_models import make_checkpoint


def make_run(folder: Path, out: Path) -> ConvertRun:
    text = folder / "text.txt"
    text.write_text("".join(f"value_{i} = {i * i}\n" for i in range(800)))
    options = ConvertOptions(
        data=text,
        heads_share=0.1,
        window_tokens=64,
        index_dim=4,
        documents=1,
        document_tokens=300,
        fit=FitOptions(
            steps=2, queries=16, moment_documents=1, trial_documents=1, quality_documents=1
        ),
    )
    return ConvertRun(preflight(folder), out, options, Console(quiet=True))


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    """Two fine-tunes of one model differ in nothing but their numbers."""
    folder, out = tmp_path / "model", tmp_path / "out"
    make_checkpoint("qwen3", folder)
    make_run(folder, out).open()
    make_run(folder, out).open()  # the same model goes on
    before = model_digest(preflight(folder))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors")
    assert model_digest(preflight(folder)) != before
    with pytest.raises(ConversionError, match="another model"):
        make_run(folder, out).open()


def test_a_fit_is_done_again_only_when_the_heads_have_changed(tmp_path: Path) -> None:
    """Else an edited head list would be exported with the indexers of other heads."""
    folder, out = tmp_path / "model", tmp_path / "out"
    make_checkpoint("qwen3", folder)
    run = make_run(folder, out)
    run.open()
    run.calibrate()
    run.fit()
    first = (run.work.path / "indexer.safetensors").read_bytes()
    (run.work.path / "indexer.safetensors").write_bytes(b"untouched")
    run.fit()
    assert (run.work.path / "indexer.safetensors").read_bytes() == b"untouched"
    heads = read_json(run.work.heads_file)
    count = sum(map(len, heads["retrieval_heads"]))
    moved = [[], [], list(range(count))]
    assert heads["retrieval_heads"] != moved
    write_json(run.work.heads_file, heads | {"retrieval_heads": moved})
    run.fit()
    assert (run.work.path / "indexer.safetensors").read_bytes() != first
    run.export()
    stored = load_file(out / "indexer.safetensors")
    assert {name.split(".")[2] for name in stored} == {"2"}
    section = json.loads((out / "config.json").read_text())["rtpurbo"]
    assert {line["layer"] for line in section["calibration"]["indexer"]["heads"]} == {2}


def test_export_copies_weights_byte_for_byte_and_leaves_no_part(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "made" / "out"
    make_checkpoint("qwen2", folder)
    run = make_run(folder, out)
    run.open()
    run.calibrate()
    run.fit()
    run.export()
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.work"]
    with pytest.raises(ConversionError, match="exists already"):
        run.export()
    assert all(tensor.dtype == torch.float32 for tensor in load_file(out / INDEXER).values())


INDEXER = "indexer.safetensors"


@pytest.mark.parametrize("text", ["{", ""])
def test_a_broken_state_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConversionError, match=r"run\.json: not readable"):
        read_json(path)
