"""Where the report's numbers come from, and what is not used or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conversion.report.report_folder import make_report
from engine.model.checkpoint import preflight
from tests.conversion.report.report_data import evaluation, refusal, report_of, silent, written
from tests.engine.model.tiny_models import make_checkpoint


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about them, and they take seconds."""
    monkeypatch.setattr("conversion.report.report_folder.draw_pictures", lambda contents: {})


def state(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out.with_name("out.work") / name).read_text())
    return found


def test_the_numbers_are_those_of_the_state(conversion: Path) -> None:
    out = conversion / "out"
    found = report_of(out)
    heads, quality, distil, run = (
        state(out, name) for name in ("heads.json", "quality.json", "distil.json", "run.json")
    )
    for key in ("scores", "scores_deviation", "scores_least", "scores_most", "scores_by_length"):
        assert found["heads"][key] == heads[key]
    assert found["indexer"]["heads"] == quality["heads"]
    assert found["indexer"]["losses"] == quality["losses"]
    for key in ("stopped", "steps", "best", "before", "validations", "losses"):
        assert found["distil"][key] == distil[key]
    assert found["options"] == run["options"]
    model = found["model"]
    assert model["retrieval_heads"] == heads["retrieval_heads"]
    assert (model["source"], model["source_sha256"]) == (run["model"], run["model_sha256"])


def test_costs_are_counted_from_the_heads(conversion: Path) -> None:
    """Keys and values of whole KV heads, and an index row for each retrieval head, in bfloat16."""
    found = report_of(conversion / "out")["model"]
    config = preflight(conversion / "out").config
    kept = {
        (layer, head // config.group_size)
        for layer, heads in enumerate(found["retrieval_heads"])
        for head in heads
    }
    rows = sum(map(len, found["retrieval_heads"]))
    assert found["kept_kv_heads"] == len(kept)
    assert found["kv_growth_bytes"] == 2 * (2 * len(kept) * config.head_dim + 4 * rows)
    dense = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert found["kv_growth_bytes_dense"] == dense
    assert found["kv_costs"][-1]["length"] == config.max_position_embeddings
    assert all(cost["dense_bytes"] == dense for cost in found["kv_costs"])


def test_without_the_state_the_means_of_config_json_are_shown(out: Path) -> None:
    shutil.rmtree(out.with_name("out.work"))
    before = report_of(out)
    shutil.rmtree(out / "report")
    make_report(out, silent)
    found = report_of(out)
    assert found["heads"]["scores"] == before["heads"]["scores"]
    assert found["heads"]["scores_deviation"] is None
    assert found["indexer"]["losses"] == []
    assert [head["answers"] for head in found["indexer"]["heads"]] == [
        head["answers"] for head in before["indexer"]["heads"]
    ]
    assert found["distil"]["best"] == before["distil"]["best"]


def test_what_is_not_given_anew_is_kept(evaluated: Path, tmp_path: Path) -> None:
    """The state may be gone when an evaluation comes later."""
    before = report_of(evaluated)
    shutil.rmtree(evaluated.with_name("out.work"))
    make_report(evaluated, silent)
    assert report_of(evaluated) == before
    later = written(tmp_path / "later.json", evaluation(lengths=(1024,)).as_dict())
    make_report(evaluated, silent, evaluations=[later])
    found = report_of(evaluated)
    assert [cell["length"] for cell in found["evaluations"][0]["cells"]] == [1024] * 4
    for name in ("heads", "indexer", "distil", "options", "converted_with", "ablations"):
        assert found[name] == before[name]


def test_a_state_of_another_conversion_is_not_used(out: Path) -> None:
    shutil.rmtree(out / "report")
    heads = state(out, "heads.json")
    heads["scores"][0][0] += 0.25
    written(out.with_name("out.work") / "heads.json", heads)
    told: list[str] = []
    make_report(out, told.append)
    assert ["another conversion" in line for line in told] == [True]
    found = report_of(out)
    assert found["heads"]["scores_deviation"] is None
    assert found["options"] is None


def test_heads_that_were_refitted_since_are_not_mixed_in(out: Path) -> None:
    """OUT.work/heads.json may be edited and fitted again while OUT stays as it was exported."""
    shutil.rmtree(out / "report")
    quality = state(out, "quality.json")
    exported = quality["heads"][0]["answers"]["kl"]
    quality["heads"][0]["answers"]["kl"] = exported + 1
    written(out.with_name("out.work") / "quality.json", quality)
    make_report(out, silent)
    found = report_of(out)["indexer"]
    assert found["losses"] == []
    assert found["heads"][0]["answers"]["kl"] == exported


def test_a_report_of_another_model_is_not_used(evaluated: Path) -> None:
    config = json.loads((evaluated / "config.json").read_text())
    config["rtpurbo"]["window_tokens"] = 32
    (evaluated / "config.json").write_text(json.dumps(config))
    told: list[str] = []
    make_report(evaluated, told.append)
    assert ["of another model" in line for line in told] == [True]
    assert report_of(evaluated)["evaluations"] == []


def test_folders_that_cannot_be_told_of_are_refused(out: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(lambda: make_report(tmp_path / "nowhere", silent))
    make_checkpoint("qwen3", tmp_path / "plain")
    assert "dense model" in refusal(lambda: make_report(tmp_path / "plain", silent))
    (out / "report" / "report.json").write_text("{}")
    assert "report.json" in refusal(lambda: make_report(out, silent))


@pytest.mark.parametrize("name", ["run.json", "heads.json", "quality.json", "distil.json"])
def test_a_broken_state_file_is_named(name: str, out: Path) -> None:
    (out.with_name("out.work") / name).write_text("{")
    assert name in refusal(lambda: make_report(out, silent))
