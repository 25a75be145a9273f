"""The text: Python sources, split by file into what is trained on and what is held out.

Prepared once into a folder:

    tokenizer.json      byte-level BPE with single digits, trained on the training files
    train.npy           uint16 token ids of all training files, each followed by END
    held_out.npy        the same of the held-out files
    held_out/           those files as text, to evaluate a conversion on
    corpus.json         what it was made of
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conversion.errors import ConversionError
from conversion.state import read_json, write_json
from conversion.text_source import load_tokenizer, python_folders

END = 0  # id of END_TEXT, between files
END_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.02  # of the files, by a hash of their content
MIN_CHARS, MAX_CHARS = 200, 400_000  # of a file; larger ones are generated tables
BPE_CHARS = 60_000_000  # the tokenizer is trained on a sample of this size
BATCH_FILES = 512


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids, memory-mapped, and the tokenizer that made them."""

    tokenizer: Tokenizer
    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    description: dict[str, Any]

    @classmethod
    def prepare(
        cls, folders: Sequence[Path], vocab_size: int, out: Path, tokenizer: Path | None = None
    ) -> Corpus:
        """Read, split, train the tokenizer and tokenise; or open what was prepared before.

        Args:
            tokenizer: a tokenizer.json to use; None trains one.

        Raises:
            ConversionError: there is no text, or too little of it.
        """
        if not (out / "corpus.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            _prepare(folders or python_folders(), vocab_size, out, tokenizer)
        return cls.open(out)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """What `prepare` left; raises ConversionError."""
        try:
            return cls(
                Tokenizer.from_file(str(folder / "tokenizer.json")),
                np.load(folder / "train.npy", mmap_mode="r"),
                np.load(folder / "held_out.npy", mmap_mode="r"),
                read_json(folder / "corpus.json"),
            )
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConversionError(f"{folder}: not a prepared corpus ({error})") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token, so that numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _prepare(
    folders: Sequence[Path], vocab_size: int, out: Path, own_tokenizer: Path | None
) -> None:
    train, held_out = _split(_read(folders))
    if not train or not held_out:
        raise ConversionError("too little text: no file to train on, or none to hold out")
    if own_tokenizer is None:
        tokenizer = train_tokenizer(_sample(train), vocab_size)
    else:
        tokenizer = load_tokenizer(own_tokenizer.parent)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConversionError(
            f"too little text for a vocabulary of {vocab_size}: {tokenizer.get_vocab_size()} found"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_texts(held_out, out / "held_out")
    counts = {}
    for name, texts in (("train", train), ("held_out", held_out)):
        ids = _tokenise(tokenizer, texts)
        np.save(out / f"{name}.npy", ids)
        counts[name] = {
            "files": len(texts),
            "tokens": len(ids),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    write_json(out / "corpus.json", {"folders": [folder.name for folder in folders], **counts})


def _read(folders: Sequence[Path]) -> dict[str, str]:
    """Texts by the hash of their content: the same file in two places counts once."""
    texts: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder")
        for file in folder.rglob("*.py"):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if MIN_CHARS <= len(text) <= MAX_CHARS and END_TEXT not in text:
                texts[hashlib.sha256(text.encode()).hexdigest()] = text
    return texts


def _split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts, both in the order of their hashes, which is random enough."""
    limit = int(HELD_OUT_SHARE * 16**8)
    train: list[str] = []
    held_out: list[str] = []
    for digest in sorted(texts):
        # Not the leading digits, which are the order.
        (held_out if int(digest[-8:], 16) < limit else train).append(texts[digest])
    return train, held_out


def _sample(texts: list[str]) -> Iterable[str]:
    total = 0
    for text in random.Random(0).sample(texts, len(texts)):
        total += len(text)
        if total > BPE_CHARS:
            return
        yield text


def _write_texts(texts: list[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.py").write_text(text, encoding="utf-8")


def _tokenise(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """All texts in a row; the library uses every core."""
    parts: list[NDArray[np.uint16]] = []
    for start in range(0, len(texts), BATCH_FILES):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH_FILES]):
            parts.append(np.array([*encoding.ids, END], dtype=np.uint16))
    return np.concatenate(parts)
