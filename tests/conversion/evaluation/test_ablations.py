"""Ablations of tiny random models: what is measured, what is left out, and a run that is killed."""

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

from conversion.convert_options import ConvertOptions
from conversion.errors import ConversionError
from conversion.evaluation.ablation_model import AblationModel
from conversion.evaluation.ablation_plan import TOP_P_POINTS, AblationPlan, indexers_of
from conversion.evaluation.ablation_table import print_ablations
from conversion.evaluation.ablations import AblationRun, ablate
from conversion.evaluation.in_process import InProcess
from conversion.evaluation.options import EvalOptions
from conversion.evaluation.run import evaluate
from conversion.fit_options import FitOptions
from conversion.pipeline import convert
from engine.model.config import SparseAttentionConfig
from engine.model.config_reader import read_config
from engine.model.decoder import Indexer
from engine.model.weights import load_decoder
from tests.engine.model.tiny_models import make_checkpoint

QUIET = Console(file=io.StringIO())
LENGTH, POSITIONS = 800, 900
CURVES = [
    "window 32",
    "window 128",
    *(f"top_p {value}" for value in TOP_P_POINTS),
    "heads 3",
    "heads 2",
    "heads 1",
    "index_dim 4",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        lines = (f"value_{i} = compute({i}, {i * number})\n" for i in range(700))
        (folder / f"{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_checkpoint("qwen3", folder, max_position_embeddings=POSITIONS)
    return folder


@pytest.fixture(scope="module")
def converted(dense_folder: Path, data: Path) -> Path:
    """A converted folder with its state beside it."""
    folder = dense_folder.with_name("sparse")
    options = ConvertOptions(
        data=data,
        heads_share=0.22,
        window_tokens=64,
        index_dim=8,
        block_tokens=16,
        top_p=0.6,
        documents=1,
        document_tokens=300,
        fit=FitOptions(
            steps=2, queries=16, moment_documents=1, trial_documents=1, quality_documents=1
        ),
    )
    convert(dense_folder, folder, options, QUIET)
    return folder


def options(data: Path, **values: Any) -> EvalOptions:
    small: dict[str, Any] = {
        "tasks": ("code_constant", "trace_counters"),
        "lengths": (LENGTH,),
        "samples": 1,
        "facts": (2,),
        "text_samples": 1,
        "decoded": 40,
        "data": data,
    }
    return EvalOptions(**{**small, **values})


@pytest.fixture(scope="module")
def found(converted: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out") / "ablations.json"
    wanted = options(data, tasks=("code_constant", "trace_counters", "text"), samples=2)
    content = ablate(converted, out, wanted, None, QUIET)
    assert content == json.loads(out.read_text())
    return content


def report(content: dict[str, Any], name: str) -> dict[str, Any]:
    own: dict[str, Any] = content["variants"][name]["report"]
    return own


def attended(content: dict[str, Any], name: str) -> float:
    share: float = report(content, name)["cells"][0]["attended"]["sparse"]
    return share


def test_every_part_and_every_curve_is_measured_beside_the_same_dense_model(
    found: dict[str, Any],
) -> None:
    parts = ["sparse", "random heads", "closed form", "top-k"]
    assert list(found["variants"]) == [*parts, *CURVES]
    reference = report(found, "sparse")
    for name in found["variants"]:
        own = report(found, name)
        assert own["variants"] == ["dense", "sparse"]
        assert [cell["setting"] for cell in own["cells"]] == [
            cell["setting"] for cell in reference["cells"]
        ]
        for cell, same in zip(own["cells"], reference["cells"], strict=True):
            assert cell["scores"]["dense"] == same["scores"]["dense"]
        assert [line["prompt"] for line in own["agreements"]] == ["served", "dense"]
    kl = {name: report(found, name)["agreements"][0]["kl_mean"] for name in found["variants"]}
    assert len(set(kl.values())) == len(kl)  # no two of them are the same model


def test_what_cannot_be_had_is_said(found: dict[str, Any]) -> None:
    assert set(found["skipped"]) == {"without stage 2", "index_dim 8", "index_dim 32"}
    assert "was not distilled" in found["skipped"]["without stage 2"]
    assert found["skipped"]["index_dim 8"] == "it is `closed form`"
    assert "head_dim 16" in found["skipped"]["index_dim 32"]


def test_the_shipped_variant_is_what_eval_measures(
    found: dict[str, Any], converted: Path, data: Path
) -> None:
    wanted = options(data, tasks=("code_constant", "trace_counters", "text"), samples=2)
    measured = json.loads(json.dumps(evaluate(converted, wanted, QUIET).as_dict()))
    own = report(found, "sparse")
    for part in ("cells", "agreements", "curves", "averages", "notes"):
        assert own[part] == measured[part]


def test_settings_say_what_each_variant_is(found: dict[str, Any], converted: Path) -> None:
    shipped = read_config(converted).sparse
    assert shipped is not None
    sections = {name: report(found, name)["settings"]["sparse"] for name in found["variants"]}
    count = sum(map(len, shipped.retrieval_heads))
    assert count == 4
    assert sum(map(len, sections["random heads"]["retrieval_heads"])) == count
    assert sections["random heads"]["retrieval_heads"] != sections["sparse"]["retrieval_heads"]
    assert sections["window 32"] == {**sections["sparse"], "window_tokens": 32}
    assert {p for layer in sections["top_p 0.95"]["top_p"] for p in layer} == {0.95}
    assert sections["index_dim 4"] == {**sections["sparse"], "index_dim": 4}
    scores = json.loads((converted.with_name("sparse.work") / "heads.json").read_text())["scores"]
    ranked = sorted(
        ((n, head) for n, heads in enumerate(shipped.retrieval_heads) for head in heads),
        key=lambda place: -scores[place[0]][place[1]],
    )
    for kept in (3, 2, 1):
        heads = sections[f"heads {kept}"]["retrieval_heads"]
        assert {(n, head) for n, own in enumerate(heads) for head in own} == set(ranked[:kept])


def test_kv_bytes_are_those_of_the_pools(found: dict[str, Any], converted: Path) -> None:
    """3 layers of 2 KV heads of 16 dimensions; a window of 64 and 4 sinks."""
    shipped = read_config(converted).sparse
    assert shipped is not None
    full_kv = sum(len({head // 3 for head in heads}) for heads in shipped.retrieval_heads)
    growing = 2 * (full_kv * 2 * 16 + 4 * 8)
    windowed = 2 * (6 - full_kv) * 2 * 16
    assert report(found, "sparse")["settings"]["kv_bytes_per_token"] == {
        str(LENGTH): {"dense": 2 * 6 * 2 * 16, "sparse": growing + windowed * 68 // LENGTH}
    }


def test_top_k_costs_what_top_p_costs(found: dict[str, Any]) -> None:
    """Rounded up: at most a block of 16 tokens more per head, and hardly ever fewer."""
    assert attended(found, "sparse") < 0.9
    more = attended(found, "top-k") - attended(found, "sparse")
    assert -2 / LENGTH < more < 16 / LENGTH
    settings = report(found, "sparse")["settings"]
    blocks = settings["blocks_per_head"][str(LENGTH)]
    assert list(blocks) == ["code_constant", "trace_counters", "text"]
    for layers in blocks.values():
        assert list(map(len, layers)) == list(map(len, settings["sparse"]["top_p"]))
        assert all(1 <= mean <= LENGTH / 16 for layer in layers for mean in layer)
    assert blocks["text"] != blocks["code_constant"]


def test_a_larger_top_p_attends_more(found: dict[str, Any]) -> None:
    shares = [attended(found, f"top_p {value}") for value in TOP_P_POINTS]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_the_table_has_a_line_for_each_variant_and_says_what_it_is(found: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_ablations(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    for name, own in found["variants"].items():
        assert f"│ {name} " in text
        assert f"{name}: {own['description']}"[:150] in text
    assert "without stage 2: left out, " in text


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
    alone = AblationPlan(AblationModel(folder, options(data), None, QUIET), seed=0)
    assert "--teacher" in alone.skipped["without stage 2"]
    assert "without stage 2" not in [own.name for own in alone.ablations]


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
    first, none, last = indexers_of(decoder.config, decoder.indexers, ((1, 5), (), ()))
    whole = decoder.indexers[0]
    assert isinstance(first, Indexer)
    assert whole is not None
    assert none is None
    assert last is None
    assert torch.equal(first.q_proj_HID, whole.q_proj_HID[[1, 2]])
    rows = [0, 1] if scope == "kv_head" else [1, 2]  # heads 0 and 1 share KV head 0
    assert torch.equal(first.k_proj_HID, whole.k_proj_HID[rows])


def test_what_cannot_be_ablated_is_refused(
    converted: Path, dense_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"

    def refused(message: str, model: Path, work: Path | None = None, **values: Any) -> None:
        with pytest.raises(ConversionError, match=message) as caught:
            ablate(model, out, options(data, **values), work, QUIET)
        assert "\n" not in str(caught.value)

    refused("is a dense model: there is nothing to take away", dense_folder)
    refused("no such folder", converted, tmp_path / "nowhere")
    refused("no list retrieval_heads", converted, tmp_path)
    refused("length 901 is beyond", converted, lengths=(POSITIONS + 1,))
    refused("belong|in process", converted, attention=("dense",))
    other = tmp_path / "other"
    make_checkpoint("qwen3", other, seed=5, max_position_embeddings=POSITIONS)
    refused("of another model than the teacher", converted, teacher=other)
    state = converted.with_name("sparse.work")
    heads: SparseAttentionConfig | None = read_config(converted).sparse
    assert heads is not None
    chosen = [list(layer)[:1] for layer in heads.retrieval_heads]
    assert any(chosen)
    shutil.copytree(state, tmp_path / "state")
    (tmp_path / "state" / "heads.json").write_text(json.dumps({"retrieval_heads": [[5], [5], [5]]}))
    refused("its heads are not those of", converted, tmp_path / "state")
    out.write_text("[1, 2]")
    refused("not a file of ablations", converted)
    out.write_text("{")
    refused("not readable", converted)
