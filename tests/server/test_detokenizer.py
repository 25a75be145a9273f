"""Incremental text equals decoding at once, and no half character ever leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.tokenizer import Tokenizer
from server.detokenizer import WindowDetokenizer, make_detokenizer
from tests.engine.byte_tokenizer import byte_tokenizer

BYTES = Tokenizer(byte_tokenizer(320), {})


def sentencepiece_like() -> Tokenizer:
    """Metaspace words and byte fallback, as Llama 2 and Mistral have it."""
    words = ["▁hello", "▁wor", "ld", "!", "▁", "é"]
    vocab = {word: i for i, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return Tokenizer(backend, {})


PIECES = sentencepiece_like()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_decoded_at_once(raw: bytes) -> None:
    ids = [next(i for i in range(64, 320) if BYTES.token_bytes(i) == bytes([b])) for b in raw]
    detokenizer = make_detokenizer(BYTES)
    pieces = [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]
    assert "".join(pieces) == raw.decode("utf-8", "replace") == BYTES.decode(ids)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=20))
def test_valid_text_never_shows_a_replacement(text: str) -> None:
    detokenizer = make_detokenizer(BYTES)
    pieces = [detokenizer.push(token_id) for token_id in BYTES.encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_a_decoder_that_trims_its_first_space(ids: list[int]) -> None:
    detokenizer = make_detokenizer(PIECES)
    assert isinstance(detokenizer, WindowDetokenizer)
    joined = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    assert joined == PIECES.decode(ids)


def test_the_continuation_of_a_prompt_keeps_its_space() -> None:
    detokenizer = make_detokenizer(PIECES, context=[0])
    assert detokenizer.push(1) == " wor"


def test_byte_fallback_waits_for_the_whole_character() -> None:
    face = "\U0001f600".encode()
    detokenizer = make_detokenizer(PIECES)
    pieces = [detokenizer.push(6 + byte) for byte in face]
    assert pieces == ["", "", "", "\U0001f600"]


def fallback_ids(text: str) -> list[int]:
    return [6 + byte for byte in text.encode()]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 5).map(lambda token_id: [token_id]),
            st.text("aé漢\U0001f600", min_size=1, max_size=5).map(fallback_ids),
        ),
        max_size=8,
    ),
    st.integers(0, 8),
)
def test_runs_of_fallback_bytes_of_any_length(groups: list[list[int]], prompt: int) -> None:
    """A run longer than the window used to be cut inside a character and came out as U+FFFD."""
    ids = [token_id for group in groups for token_id in group]
    begin = sum(map(len, groups[:prompt]))
    detokenizer = make_detokenizer(PIECES, context=ids[:begin])
    text = "".join(detokenizer.push(token_id) for token_id in ids[begin:]) + detokenizer.flush()
    assert PIECES.decode(ids[:begin]) + text == PIECES.decode(ids)


def test_bytes_that_are_no_character_are_replaced_and_lose_nothing_after_them() -> None:
    detokenizer = make_detokenizer(PIECES)
    ids = [0, *fallback_ids("\U0001f600"), 6 + 0xE4, 1, 2]
    pieces = [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]
    assert "".join(pieces) == "hello\U0001f600\ufffd world"


def test_special_tokens_are_skipped_or_shown() -> None:
    backend = byte_tokenizer(320)
    backend.add_special_tokens(["<|end|>"])
    tokenizer = Tokenizer(backend, {})
    end = backend.token_to_id("<|end|>")
    assert end is not None
    assert make_detokenizer(tokenizer).push(end) == ""
    assert make_detokenizer(tokenizer, skip_special_tokens=False).push(end) == "<|end|>"


def test_ids_without_a_text_are_nothing() -> None:
    assert make_detokenizer(BYTES).push(5000) == ""


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_tokenizer_files_that_are_not_usable(tmp_path: Path, text: str) -> None:
    from engine.errors import CheckpointError

    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not usable"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer.from_folder(tmp_path / "nowhere")
