"""Token ids to text as they arrive: no partial character ever leaves, and nothing is lost."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from engine.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6  # of what came before, so that a decoder that trims a first space does not


class Detokenizer(Protocol):
    """Incremental decoding of one sequence."""

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; the rest is held back."""
        ...

    def flush(self) -> str:
        """What is still held back, incomplete bytes as U+FFFD. Nothing may be pushed after it."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> Detokenizer:
    """The right kind for the tokenizer; `context` are the ids before the first one pushed."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, context, skip_special_tokens)


class ByteDetokenizer:
    """For byte-level tokenizers: tokens are bytes, and UTF-8 is decoded incrementally. O(1)."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decode the last few tokens again, and emit what is new.

    Tokens of byte fallback (`<0xE4>`) are bytes of a character and go through an incremental UTF-8
    decoder; the window holds the others only, because a run of bytes that is cut anywhere decodes
    to nothing but replacement characters. Other text that ends in U+FFFD may be half a character,
    so it waits; a character has at most four bytes, so after four more tokens it is real.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # Stands for a run of bytes: a decoder that trims a first space must see text before it.
        self._anchor = [i for i, byte in tokenizer.fallback_bytes.items() if byte == ord("A")]
        self._ids: list[int] = []
        for token_id in context[-_CONTEXT_TOKENS:]:
            is_text = self._byte(token_id) is None
            self._ids = [*self._ids, token_id] if is_text else list(self._anchor)
        self._emitted = len(self._decode())
        self._held = 0

    def push(self, token_id: int) -> str:
        byte = self._byte(token_id)
        if byte is not None:
            text = self._settle()
            self._ids = list(self._anchor)
            self._emitted = len(self._decode())
            return text + self._bytes.decode(bytes([byte]))
        before = self._bytes.decode(b"", final=True)
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith("\ufffd") and self._held < 4:
            self._held += 1
            return before
        return before + self._emit(text)

    def flush(self) -> str:
        return self._settle() + self._bytes.decode(b"", final=True)

    def _byte(self, token_id: int) -> int | None:
        return self._tokenizer.fallback_bytes.get(token_id)

    def _settle(self) -> str:
        """What is held back of the window."""
        return self._emit(self._decode())

    def _emit(self, text: str) -> str:
        new = text[self._emitted :]
        self._ids = self._ids[-_CONTEXT_TOKENS:]
        self._emitted = len(self._decode())
        self._held = 0
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
