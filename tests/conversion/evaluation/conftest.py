"""What evaluations are made of; those of ablations/ have their own, which is smaller."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.evaluation.small_evaluation import POSITIONS
from tests.engine.model.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text."""
    folder = tmp_path_factory.mktemp("data")
    lines = (f"value_{i} = compute({i}, {i * i})\n" for i in range(2000))
    (folder / "source.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with dense attention."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_checkpoint("llama", folder, max_position_embeddings=POSITIONS)
    return folder
