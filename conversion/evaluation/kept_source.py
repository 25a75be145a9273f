"""Text that is encoded once, for tasks that plant their facts into the same files. Torch-free."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from conversion.text_source import TextSource


@dataclass(frozen=True, slots=True)
class KeptSource(TextSource):
    """A source for one tokenizer; keeps four bytes for each token that was ever read."""

    kept: dict[Path, array[int] | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, source: TextSource) -> KeptSource:
        """The same files, nothing of them read yet."""
        return cls(source.files, source.description)

    def file_ids(self, tokenizer: Tokenizer, file: Path) -> Sequence[int] | None:
        """As `TextSource.file_ids`; the tokenizer is the same in every call."""
        if file not in self.kept:
            ids = TextSource.file_ids(self, tokenizer, file)
            self.kept[file] = None if ids is None else array("i", ids)
        return self.kept[file]
