"""Fixtures that several files of the conversion's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion.pipeline import ConvertOptions
from tests.conversion.line_files import line_files
from tests.conversion.pipeline_case import QUICK
from tests.conversion.tiny_distillation import TinyDistillation


@pytest.fixture
def options(tmp_path: Path) -> ConvertOptions:
    return ConvertOptions(
        data=line_files(tmp_path / "text"),
        heads_share=0.25,
        window_tokens=64,
        index_dim=4,
        block_tokens=16,
        documents=2,
        document_tokens=300,
        dense_below=100,
        fit=QUICK,
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host without matplotlib: to draw takes longer than to convert so small a model."""
    monkeypatch.setattr("conversion.report.report_folder.has_matplotlib", lambda: False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDistillation:
    """A model with a converted index and text to train it on, a folder for each file of tests."""
    return TinyDistillation.make(tmp_path_factory.mktemp("distil"), tie_word_embeddings=True)
