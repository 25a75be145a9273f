"""Two processes on gloo calibrate and fit what one does with the same documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conversion.convert_options import ConvertOptions
from conversion.fit_options import FitOptions
from conversion.parallel import joined
from conversion.pipeline import ConvertRun
from engine.model.checkpoint import preflight
from tests.conversion.two_processes import in_two_processes
from tests.engine.model.tiny_models import make_checkpoint

OPTIONS = ConvertOptions(
    heads_share=0.1,
    causal_check=True,
    window_tokens=32,
    index_dim=4,
    block_tokens=16,
    documents=3,
    document_tokens=200,
    fit=FitOptions(
        steps=2,
        batch=2,
        queries=16,
        learning_rate=1e-2,
        warmup_steps=1,
        moment_documents=2,
        trial_documents=2,
        quality_documents=2,
        save_every=1,
    ),
)


def calibrate_and_fit(folder: Path, out: str) -> None:
    options = replace(OPTIONS, data=folder / "text.txt")
    with joined("cpu") as ranks:
        run = ConvertRun(
            preflight(folder / "model"), folder / out, options, Console(quiet=True), ranks
        )
        run.open()
        run.calibrate()
        run.fit()


def together(rank: int, folder: Path) -> None:
    calibrate_and_fit(folder, "together")


def test_two_processes_fit_what_one_fits(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"value_{i} = {i * i}\n" for i in range(800)))
    calibrate_and_fit(tmp_path, "alone")

    in_two_processes(together, tmp_path)

    alone, both = (
        json.loads((tmp_path / f"{name}.work" / "heads.json").read_text())
        for name in ("alone", "together")
    )
    assert both["retrieval_heads"] == alone["retrieval_heads"]
    assert both["causal_check"]["loss_dense"] == pytest.approx(alone["causal_check"]["loss_dense"])
    for kind in ("scores", "scores_deviation", "scores_most"):
        torch.testing.assert_close(torch.tensor(both[kind]), torch.tensor(alone[kind]))
    alone, both = (
        json.loads((tmp_path / f"{name}.work" / "quality.json").read_text())
        for name in ("alone", "together")
    )
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(both["losses"]) == 2
    for one, other in zip(alone["heads"], both["heads"], strict=True):
        assert other["setting"] == one["setting"]
        assert other["answers"]["kl"] == pytest.approx(one["answers"]["kl"], rel=1e-3)
    one, other, start = (
        load_file(tmp_path / f"{name}.work" / file)
        for name, file in (
            ("alone", "indexer.safetensors"),
            ("together", "indexer.safetensors"),
            ("alone", "fit/closed_form.safetensors"),
        )
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3)
        assert not torch.equal(tensor, start[name])
