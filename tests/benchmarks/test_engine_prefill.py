"""The prefill benchmark measures each variant that it names, on a model of no size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.engine_prefill import ENGINES, parse, run, times_faster
from benchmarks.random_model import layer_shapes, write_random_model
from engine.model.checkpoint import preflight


def tiny(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "head_dim": 8}
    return write_random_model(folder, layer_shapes(2, 300) | sizes)


def test_every_variant_has_seconds_for_every_context(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    variants = ",".join(ENGINES)
    host = ("--device=cpu", "--kv-cache-gib=0.05", "--repeats=1")
    work = (f"--model={folder}", "--context=70,200", "--chunk=64", f"--variants={variants}")
    given = parse([*host, *work])
    result = run(given)
    for variant in ENGINES:
        assert result["seconds"][f"{variant}_runs_on"] == {"prefill": "PyTorch ops"}
        assert set(result["seconds"][variant]) == {"70", "200"}
        assert all(seconds > 0 for seconds in result["seconds"][variant].values())
    assert set(result["times_faster"]) == set(ENGINES) - {"sparse"}


def test_what_failed_has_its_reason_and_no_ratio() -> None:
    seconds: dict[str, dict[str, Any]] = {
        "sparse": {"70": 2.0, "200": 4.0},
        "flash": {"70": 5.0, "200": "out of memory"},
    }
    assert times_faster(seconds) == {"flash": {"70": 2.5}}


def test_the_random_model_is_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = preflight(tiny(tmp_path / "model"))
    assert checkpoint.config.sparse is not None
    assert len(checkpoint.indexer) == 4
