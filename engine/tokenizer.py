"""Text to token ids and back, from a folder's tokenizer.json; torch-free, nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import CheckpointError


class Tokenizer:
    """A thin, typed face of the `tokenizers` library, which releases the GIL while it works.

    Special tokens written out in a text (`<|im_start|>`) become special ids, as in other servers:
    users format prompts by hand.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
        self._backend = backend
        self._settings = settings
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._text_of = {token_id: text for text, token_id in vocabulary.items()}
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        decoder = json.loads(backend.to_str())["decoder"]
        self.is_byte_level = _ends_with_byte_level(decoder)
        self.fallback_bytes = self._read_fallback_bytes(decoder)
        self.longest_token_bytes = max(map(self._length, self._text_of), default=1)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and, for the chat template, tokenizer_config.json.

        Raises:
            CheckpointError: one line that names the file.
        """
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            reason = "no such file" if not path.exists() else f"not usable ({str(error)[:80]})"
            raise CheckpointError(f"{path}: {reason}") from None
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _read_settings(folder))

    @property
    def vocab_size(self) -> int:
        """Ids that have a text; the logits may be wider or narrower."""
        return len(self._text_of)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template, if its folder has one."""
        template = self._settings.get("chat_template")
        return template if isinstance(template, str) else None

    def special_token(self, name: str) -> str | None:
        """Text of a named special token of tokenizer_config.json, such as "bos_token"."""
        value = self._settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens as the tokenizer's own post-processor adds them."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_at_most(
        self, limit: int, text: str, *, add_special_tokens: bool = True
    ) -> tuple[int, list[int]]:
        """The number of tokens of `text`, and their ids if they are not more than `limit`.

        To hand over ids holds the interpreter: those of too long a text are not asked for.
        """
        found = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return len(found), found.ids if len(found) <= limit else []

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a text nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token of a byte-level tokenizer; empty for ids without a text."""
        assert self.is_byte_level
        if token_id in self._added:
            return self._added[token_id].encode()
        text = self._text_of.get(token_id, "")
        return bytes(_BYTE_OF[letter] for letter in text if letter in _BYTE_OF)

    def _read_fallback_bytes(self, decoder: Any) -> dict[int, int]:
        """Ids of `<0x00>` to `<0xFF>` with their byte if these spell rare characters, else {}."""
        if '"ByteFallback"' not in json.dumps(decoder):
            return {}
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        found = {i: names[text] for i, text in self._text_of.items() if text in names}
        return found if len(found) == len(names) else {}

    def _length(self, token_id: int) -> int:
        """Bytes of a token's text at most; a letter of a byte-level token is one byte."""
        text = self._text_of[token_id]
        is_bytes = self.is_byte_level and token_id not in self._added
        return len(text) if is_bytes else len(text.encode())


def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with (GPT-2), back to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _ends_with_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or [None]
        return len(parts) == 1 and _ends_with_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise CheckpointError(f"{path}: not valid JSON") from None
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: not a JSON object")
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings
