"""What the serving benchmark sends: real Python source, cut to an exact number of tokens."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from engine.tokenizer import Tokenizer


def source_files(seed: int) -> Iterator[Path]:
    """The standard library's Python files in an order drawn from `seed`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(seed).shuffle(files)
    return iter(files)


def code_prompt(tokenizer: Tokenizer, tokens: int, seed: int) -> list[int]:
    """Token ids of a prompt of exactly `tokens` tokens; another seed shares no prefix with it.

    Raises:
        ValueError: the standard library holds less text than that.
    """
    ids: list[int] = []
    for path in source_files(seed):
        ids.extend(tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")))
        if len(ids) >= tokens:
            return ids[:tokens]
    raise ValueError(f"the standard library has only {len(ids)} tokens, {tokens} were asked for")
