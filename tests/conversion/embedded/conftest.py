"""Text that several modules train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion.embedded.corpus import Corpus
from tests.conversion.embedded.little_text import VOCABULARY, text_folders


@pytest.fixture(scope="module", autouse=True)
def little_text() -> Iterator[None]:
    """Of which enough is held out, and not all of that is judged by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conversion.embedded.corpus.HELD_OUT_SHARE", 0.2)
        patch.setattr("conversion.embedded.judge.LOSS_TOKENS", 2**12)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, little_text: None) -> Path:
    """A folder to train in, whose text was read and tokenised already."""
    folder = tmp_path_factory.mktemp("prepared")
    Corpus.prepare(text_folders(), VOCABULARY, folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Corpus:
    return Corpus.open(prepared / "corpus")
