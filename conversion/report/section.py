"""What a page is made of. Torch-free; all text is plain and escaped where the page is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True, slots=True)
class Heading:
    """Inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    kind: ClassVar[str] = "bullets"
    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Missing:
    """Data that are not there, and the command that gets them."""

    kind: ClassVar[str] = "missing"
    text: str
    command: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG of the report's folder; not shown if it could not be drawn."""

    kind: ClassVar[str] = "picture"
    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text, as many in each row as there are columns. The first `words` columns are
    words, the others numbers."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    words: int = 1

    @property
    def is_long(self) -> bool:
        """Folded on the screen."""
        return len(self.rows) > 24


Block = Paragraph | Heading | Bullets | Missing | Picture | Table


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the table of contents."""

    id: str  # of the anchor
    title: str
    blocks: Sequence[Block]


EVALUATE = "rtpurbo eval OUT --json > eval.json && rtpurbo report OUT --eval eval.json"
ABLATE = "rtpurbo ablate OUT ablations.json && rtpurbo report OUT --ablations ablations.json"
CONVERT = "rtpurbo convert MODEL OUT"


def counted(count: int, noun: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
