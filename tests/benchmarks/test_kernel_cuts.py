"""What the anatomy of decode cuts out of the kernel is still there to be cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernel_cuts import KERNEL, VARIANTS, Cut, cut_sources
from kernels._build import SOURCES


@pytest.mark.parametrize("name", VARIANTS)
def test_every_cut_finds_its_place(name: str, tmp_path: Path) -> None:
    cut_sources(tmp_path / "csrc", VARIANTS[name])
    changed = [
        path.name
        for path in (tmp_path / "csrc").iterdir()
        if path.read_text() != (SOURCES / path.name).read_text()
    ]
    assert bool(changed) == bool(VARIANTS[name])
    assert (tmp_path / "csrc" / KERNEL).is_file()
    for cut in VARIANTS[name]:
        assert any(cut.new in path.read_text() for path in (tmp_path / "csrc").iterdir())


def test_only_one_source_is_compiled_anew() -> None:
    """A cut may lie in a header, as long as no other source has it."""
    headers = {"strip.cuh"}  # where cuts of the kernel's own parts lie
    for path in SOURCES.glob("*.cu"):
        if path.name != KERNEL:
            assert not any(f'"{header}"' in path.read_text() for header in headers)


@pytest.mark.parametrize("text", ["no such text", "int"])
def test_a_text_that_is_not_there_once_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not once"):
        cut_sources(tmp_path / "csrc", [Cut(text, "")])
