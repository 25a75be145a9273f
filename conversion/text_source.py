"""Text for calibration: documents of a given number of tokens, from files or from this Python.

Torch-free. A document is several whole files in a row, cut at its end; the order is a function of
the seed alone, so that a resumed conversion sees the same text.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from conversion.errors import ConversionError
from conversion.side_by_side import ahead
from engine.errors import CheckpointError

MIN_FILE_CHARS = 500
MAX_FILE_CHARS = 2_000_000  # larger files are data more often than text
TEXT_SUFFIXES = frozenset({".md", ".py", ".rst", ".txt"})


@dataclass(frozen=True, slots=True)
class TextSource:
    """Files to read, and words for people on where they come from."""

    files: tuple[Path, ...]
    description: str

    @classmethod
    def find(cls, data: Path | None) -> TextSource:
        """The text files of `data` (a file or a folder), or Python's own sources if it is None.

        Raises:
            ConversionError: the path does not exist or holds no text file.
        """
        if data is None:
            files = sorted({file for folder in python_folders() for file in folder.rglob("*.py")})
            return cls(tuple(files), "Python sources of the running environment")
        if data.is_file():
            return cls((data,), str(data))
        if not data.is_dir():
            raise ConversionError(f"{data}: no such file or folder")
        files = sorted(f for f in data.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file())
        if not files:
            raise ConversionError(f"{data}: no text file ({', '.join(sorted(TEXT_SUFFIXES))})")
        return cls(tuple(files), str(data))

    def documents(
        self, tokenizer: Tokenizer, count: int, tokens: int, seed: int
    ) -> list[list[int]]:
        """`count` documents of exactly `tokens` token ids, no text used twice.

        Raises:
            ConversionError: there is less text than that.
        """
        stream = self.stream(tokenizer, tokens, seed)
        documents: list[list[int]] = []
        for number in range(count):
            try:
                documents.append(next(stream))
            except StopIteration as end:
                raise ConversionError(
                    f"{self.description}: too little text, it ends in document {number + 1} "
                    f"of {count} after {end.value} of {tokens} tokens"
                ) from None
        return documents

    def stream(
        self, tokenizer: Tokenizer, tokens: int, seed: int
    ) -> Generator[list[int], None, int]:
        """Documents of exactly `tokens` token ids for as long as there is text, none used twice.

        Returns how many tokens were left for a document that could not be filled.
        """
        ids: list[int] = []
        for piece in self._pieces(tokenizer, seed):
            ids.extend(piece)
            while len(ids) >= tokens:
                yield ids[:tokens]
                ids = ids[tokens:]  # a long file goes on in the next document
        return len(ids)

    def _pieces(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sequence[int]]:
        """Token ids of one file after the other, in an order drawn from `seed`."""
        files = list(self.files)
        random.Random(seed).shuffle(files)
        read = ahead(lambda file: self.file_ids(tokenizer, file), files)
        return (ids for ids in read if ids is not None)

    def file_ids(self, tokenizer: Tokenizer, file: Path) -> Sequence[int] | None:
        """Token ids of one of the files; None if it is not read: no text, too short or too long."""
        alone = len(self.files) == 1
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        if len(text) < (1 if alone else MIN_FILE_CHARS):
            return None
        if len(text) > MAX_FILE_CHARS and not alone:
            return None
        return encode_plain(tokenizer, text)


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in the middle of a sequence: without special tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def python_folders() -> list[Path]:
    """Where the running environment keeps Python sources."""
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys(paths[k] for k in ("stdlib", "purelib", "platlib"))]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: one line that names the file.
    """
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever is wrong
        raise CheckpointError(f"{path}: not a tokenizer ({error})".splitlines()[0]) from None
