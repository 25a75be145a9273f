"""One small model, converted once in a run of the suite for all files of ablations."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion.convert_options import ConvertOptions
from conversion.fit_options import FitOptions
from conversion.pipeline import convert
from tests.conversion.evaluation.ablations.small_ablation import POSITIONS, QUIET
from tests.engine.model.tiny_models import make_checkpoint
from tests.once import made_once


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with its state beside it; not to be changed."""
    return made_once(tmp_path_factory, "ablated", _convert) / "sparse"


@pytest.fixture(scope="session")
def dense_folder(converted: Path) -> Path:
    """The model that was converted."""
    return converted.with_name("dense")


@pytest.fixture(scope="session")
def data(converted: Path) -> Path:
    """The text that it was converted with."""
    return converted.with_name("data")


def _convert(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    for number in range(3):
        lines = (f"value_{i} = compute({i}, {i * number})\n" for i in range(700))
        (data / f"{number}.py").write_text("".join(lines))
    make_checkpoint("qwen3", folder / "dense", max_position_embeddings=POSITIONS)
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
    convert(folder / "dense", folder / "sparse", options, QUIET)
