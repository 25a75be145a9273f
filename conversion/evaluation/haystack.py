"""Prose to hide needles in: local files instead of the Paul Graham essays that RULER downloads."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conversion.errors import ConversionError

PROSE_SUFFIXES = frozenset({".md", ".rst", ".txt"})
LEAST_WORDS = 1000
MOST_WORDS = 400_000  # about 600K tokens; longer haystacks repeat, as in RULER
DOCSTRING_WORDS = 40  # shorter docstrings are labels rather than prose
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[]*[A-Z0-9])""")


@dataclass(frozen=True, slots=True)
class Haystack:
    """Words of prose in reading order, and words for people on where they come from."""

    words: tuple[str, ...]
    description: str

    @classmethod
    def find(cls, folder: Path | None) -> Haystack:
        """Prose of a file or folder; without one, docstrings of Python's standard library.

        Raises:
            ConversionError: there is no such path, or too little prose in it.
        """
        if folder is None:
            source = "docstrings of the Python standard library"
            words = _take(_docstrings(Path(sysconfig.get_paths()["stdlib"])))
        else:
            source = str(folder)
            words = _take(_texts(folder))
        if len(words) < LEAST_WORDS:
            raise ConversionError(
                f"haystack {source}: {len(words)} words of prose, at least {LEAST_WORDS} are needed"
            )
        return cls(tuple(words), f"{source} ({len(words)} words) instead of Paul Graham's essays")

    def text(self, count: int) -> str:
        """The first `count` words, the whole repeated if it is shorter."""
        words = self.words * -(-count // len(self.words))
        return " ".join(words[:count])


def sentences(text: str) -> list[str]:
    """Cut prose after . ! or ? that is followed by a new beginning. No sentence is empty."""
    return [part for part in SENTENCE_END.split(text.strip()) if part]


def _take(texts: Iterator[str]) -> list[str]:
    words: list[str] = []
    for text in texts:
        words += text.split()
        if len(words) >= MOST_WORDS:
            break
    return words[:MOST_WORDS]


def _texts(path: Path) -> Iterator[str]:
    """Readable files of a folder, by name; a file given by itself may have any suffix."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in PROSE_SUFFIXES and f.is_file())
    else:
        raise ConversionError(f"haystack {path}: no such file or folder")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of the modules right in `folder` and of its packages' own modules."""
    for file in sorted([*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")]):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= DOCSTRING_WORDS and ">>>" not in text:
                    yield text
