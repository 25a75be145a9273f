"""Ablations of a tiny random model: what is measured, what is left out, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conversion.errors import ConversionError
from conversion.evaluation.ablation_plan import TOP_P_POINTS
from conversion.evaluation.ablation_table import print_ablations
from conversion.evaluation.ablations import ablate
from conversion.evaluation.run import evaluate
from engine.model.config import SparseAttentionConfig
from engine.model.config_reader import read_config
from tests.conversion.evaluation.ablations.small_ablation import (
    LENGTH,
    POSITIONS,
    QUIET,
    options,
    report,
)
from tests.engine.model.tiny_models import make_checkpoint

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
def found(converted: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out") / "ablations.json"
    wanted = options(data, tasks=("code_constant", "trace_counters", "text"), samples=2)
    content = ablate(converted, out, wanted, None, QUIET)
    assert content == json.loads(out.read_text())
    return content


def attended(content: dict[str, Any], name: str) -> float:
    share: float = report(content, name)["cells"][0]["attended"]["sparse"]
    return share


def test_every_part_and_every_curve_is_measured_beside_the_same_dense_model(
    found: dict[str, Any],
) -> None:
    parts = ["sparse", "random heads", "closed form", "without age bias", "top-k"]
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
    assert sections["without age bias"] == {**sections["sparse"], "index_age_bias": False}
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
