"""A model folder for the toy engine: what passes all checks, though its weights are never read."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.engine.fake_engine import TOY_FILE
from tests.engine.fake_runner import EOS, VOCAB
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint


def write_toy_folder(folder: Path, step_seconds: float = 0.0, load_seconds: float = 0.0) -> None:
    """The real time that the toy takes to load, and for each of its steps."""
    write_checkpoint(folder, TinyModel(vocab=VOCAB, eos=EOS))
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / TOY_FILE).write_text(
        json.dumps({"step_seconds": step_seconds, "load_seconds": load_seconds})
    )


def toy_tokenizer() -> Tokenizer:
    """A hundred single bytes: letters, and parts of characters of two and three bytes.

    Random ids make whole characters, broken ones and ones that end in another chunk.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: hash_of(letter))
    vocab = {letter: place for place, letter in enumerate(letters[:VOCAB])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def hash_of(letter: str) -> int:
    """Mixes letters and bytes of characters, the same way each time."""
    return ord(letter) * 2654435761 % 2**32
