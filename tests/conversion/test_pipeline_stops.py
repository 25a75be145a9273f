"""A conversion that was stopped or killed ends as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conversion.indexer_training import IndexerTraining
from conversion.pipeline import ConvertOptions, ConvertRun, convert
from engine.model.checkpoint import preflight
from tests.conversion.pipeline_case import QUIET
from tests.engine.model.tiny_models import make_checkpoint


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("stop_after", ["calibrate", "fit"])
def test_a_conversion_that_was_stopped_ends_as_one_that_was_not(
    stop_after: str, tmp_path: Path, options: ConvertOptions
) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "whole", options, QUIET)
    run = ConvertRun(preflight(tmp_path / "dense"), tmp_path / "parts", options, QUIET)
    run.open()
    run.calibrate()
    if stop_after == "fit":
        run.fit()
    convert(tmp_path / "dense", tmp_path / "parts", options, QUIET)
    for name in ("config.json", "indexer.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


class KilledError(Exception):
    """The process ends here."""


@pytest.mark.usefixtures("no_pictures")
def test_a_conversion_killed_in_the_middle_of_training_ends_as_one_that_was_not(
    tmp_path: Path, options: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "whole", options, QUIET)
    take = IndexerTraining.take

    def dying(self: IndexerTraining, documents: list[Any]) -> None:
        if self.step == 2:  # has been saved
            raise KilledError
        take(self, documents)

    with monkeypatch.context() as patch:
        patch.setattr(IndexerTraining, "take", dying)
        with pytest.raises(KilledError):
            convert(tmp_path / "dense", tmp_path / "parts", options, QUIET)
    assert (tmp_path / "parts.work" / "fit" / "training.safetensors").exists()
    steps: list[int] = []

    def counting(self: IndexerTraining, documents: list[Any]) -> None:
        steps.append(self.step)
        take(self, documents)

    monkeypatch.setattr(IndexerTraining, "take", counting)
    convert(tmp_path / "dense", tmp_path / "parts", options, QUIET)
    assert steps == [2]
    for name in ("config.json", "indexer.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
