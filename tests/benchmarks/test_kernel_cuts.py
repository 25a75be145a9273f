"""What the anatomy of decode cuts out of the kernel is still there to be cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.kernel_cuts import (
    ATTENTION,
    SELECTION,
    SELECTIONS,
    VARIANTS,
    Cut,
    cut_sources,
)
from kernels._build import SOURCES

EVERY = [(ATTENTION, cuts) for cuts in VARIANTS.values()]
EVERY += [(SELECTION, cuts) for cuts in SELECTIONS.values()]
EACH = pytest.mark.parametrize(("kernel", "cuts"), EVERY, ids=[*VARIANTS, *SELECTIONS])


@EACH
def test_every_cut_finds_its_place(kernel: str, cuts: tuple[Cut, ...], tmp_path: Path) -> None:
    cut_sources(tmp_path / "csrc", cuts)
    changed = [
        path.name
        for path in (tmp_path / "csrc").iterdir()
        if path.read_text() != (SOURCES / path.name).read_text()
    ]
    assert bool(changed) == bool(cuts)
    assert (tmp_path / "csrc" / kernel).is_file()
    for cut in cuts:
        assert any(cut.new in path.read_text() for path in (tmp_path / "csrc").iterdir())


def included(path: Path) -> set[str]:
    """Names of the sources that a source includes, itself and what they include among them."""
    names = {path.name}
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        if (path.parent / name).is_file():
            names |= included(path.parent / name)
    return names


@EACH
def test_only_one_source_is_compiled_anew(kernel: str, cuts: tuple[Cut, ...]) -> None:
    """A cut may lie in a header, as long as no other kernel includes it."""
    text = {path.name: path.read_text() for path in SOURCES.iterdir()}
    places = {file for file in text for cut in cuts if cut.old in text[file]}
    assert places <= included(SOURCES / kernel)
    for path in SOURCES.glob("*.cu"):
        assert path.name == kernel or not places & included(path)


@pytest.mark.parametrize("text", ["no such text", "int"])
def test_a_text_that_is_not_there_once_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not once"):
        cut_sources(tmp_path / "csrc", [Cut(text, "")])
