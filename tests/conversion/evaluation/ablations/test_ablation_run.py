"""Runs of ablations: one that is killed, one with a teacher, and the parts of an indexer."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conversion.evaluation.ablation_model import AblationModel
from conversion.evaluation.ablation_plan import AblationPlan, indexers_of
from conversion.evaluation.ablations import AblationRun, ablate
from conversion.evaluation.in_process import InProcess
from conversion.selection_trial import try_selection
from engine.model.decoder import Indexer
from engine.model.weights import load_decoder
from tests.conversion.evaluation.ablations.small_ablation import (
    POSITIONS,
    QUIET,
    options,
    report,
)
from tests.engine.model.tiny_models import make_checkpoint


class KilledError(Exception):
    """The process ends here."""


def without_seconds(content: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(content))
    for own in copy["variants"].values():
        own["report"].pop("seconds")
    return copy


def test_a_killed_run_goes_on_where_it_was_and_dense_is_asked_once(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = options(data, tasks=("code_constant",), lengths=(400,))
    asked: list[str] = []
    scores = InProcess.scores

    def counted(self: InProcess, samples: Sequence[Any], *rest: Any) -> Any:
        asked.append(self.name)
        return scores(self, samples, *rest)

    monkeypatch.setattr(InProcess, "scores", counted)
    whole = ablate(converted, tmp_path / "whole.json", small, None, QUIET)
    assert asked.count("dense") == 1
    assert asked.count("sparse") == len(whole["variants"])

    asked.clear()
    keep, kept = AblationRun._keep, 0

    def dying(self: AblationRun, *arguments: Any) -> None:
        nonlocal kept
        if kept == 3:
            raise KilledError
        kept += 1
        keep(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AblationRun, "_keep", dying)
        with pytest.raises(KilledError):
            ablate(converted, tmp_path / "parts.json", small, None, QUIET)
    parts = ablate(converted, tmp_path / "parts.json", small, None, QUIET)
    assert without_seconds(parts) == without_seconds(whole)
    assert asked.count("dense") == 1
    assert asked.count("sparse") == len(whole["variants"]) + 1  # the one that was lost

    asked.clear()
    text = io.StringIO()
    ablate(converted, tmp_path / "parts.json", replace(small, facts=(1,)), None, Console(file=text))
    assert asked.count("sparse") == len(whole["variants"])
    assert "of another model or other settings: closed form" in text.getvalue()


def test_without_stage_2_the_sources_weights_are_measured(
    dense_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The "distilled" model here is one of other random weights, so its source is far better."""
    folder = tmp_path / "model"
    section = {
        "retrieval_heads": [[], [4], []],
        "window_tokens": 64,
        "index_dim": 16,
        "block_tokens": 16,
        "top_p": 0.99,
        "calibration": {"distil": {"steps": 1}},
    }
    make_checkpoint("qwen3", folder, section=section, seed=1, max_position_embeddings=POSITIONS)
    wanted = options(data, tasks=("text",), teacher=dense_folder, lengths=(300,))
    content = ablate(folder, tmp_path / "out.json", wanted, None, QUIET)
    kl = {name: report(content, name)["agreements"][0]["kl_mean"] for name in content["variants"]}
    assert kl["without stage 2"] < kl["sparse"] / 2
    assert content["skipped"]["heads"].startswith("no needle scores")
    assert content["skipped"]["without age bias"] == "the index has none: it is `sparse`"
    alone = AblationPlan(AblationModel(folder, options(data), None, QUIET), seed=0)
    assert "--teacher" in alone.skipped["without stage 2"]
    assert "without stage 2" not in [own.name for own in alone.ablations]


@pytest.mark.parametrize("keep_far", [True, False])
def test_the_closed_form_keeps_of_far_rows_what_the_conversion_did(
    keep_far: bool, converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noting(*args: Any, **settings: Any) -> Any:
        asked.append(settings["keep_far"])
        return try_selection(*args, **settings)

    monkeypatch.setattr("conversion.indexer_fit.try_selection", noting)
    work = shutil.copytree(converted.with_name("sparse.work"), tmp_path / "work")
    run = json.loads((work / "run.json").read_text())
    assert run["options"]["fit"]["keep_far"] is True
    run["options"]["fit"]["keep_far"] = keep_far
    (work / "run.json").write_text(json.dumps(run))
    model = AblationModel(converted, options(data), work, QUIET)
    model.closed_form(model.sparse)
    assert asked == [keep_far]


@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
def test_a_part_of_an_indexer_has_the_rows_of_its_heads(scope: str, tmp_path: Path) -> None:
    section = {
        "retrieval_heads": [[0, 1, 5], [], [2, 4]],
        "index_dim": 4,
        "index_scope": scope,
        "top_p": 0.9,
    }
    make_checkpoint("qwen3", tmp_path, section=section)
    decoder = load_decoder(tmp_path, "cpu", torch.float32)
    bias_HA = torch.arange(48.0).view(3, 16)
    indexers = [
        own and replace(own, age_bias_HA=bias_HA[: len(own.q_proj_HID)]) for own in decoder.indexers
    ]
    first, none, last = indexers_of(decoder.config, indexers, ((1, 5), (), ()))
    whole = indexers[0]
    assert isinstance(first, Indexer)
    assert whole is not None
    assert none is None
    assert last is None
    assert torch.equal(first.q_proj_HID, whole.q_proj_HID[[1, 2]])
    assert first.age_bias_HA is not None
    assert torch.equal(first.age_bias_HA, bias_HA[1:])
    rows = [0, 1] if scope == "kv_head" else [1, 2]  # heads 0 and 1 share KV head 0
    assert torch.equal(first.k_proj_HID, whole.k_proj_HID[rows])
