"""Where the tokens of an echoed prompt begin in the text that is given back."""

from __future__ import annotations

import pytest
from tokenizers import processors

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.echo import EchoedPrompt, PromptText
from tests.engine.byte_tokenizer import byte_tokenizer

TEXT = "añb"  # the middle letter has two bytes, a token each


def make_tokenizer(begin: bool) -> Tokenizer:
    backend = byte_tokenizer(320)
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<|1|> $A", special_tokens=[("<|1|>", 1)]
        )
    return Tokenizer(backend, {})


def entries(tokenizer: Tokenizer, text: str | None) -> list[tuple[int, int]]:
    """(token, offset) of the echoed prompt."""
    tokens = tokenizer.encode(TEXT)
    echo = EchoedPrompt(PromptText(tokens, text, tokenizer))
    echo.push([None, *(TokenLogprobs(token, -1.0, [], []) for token in tokens[1:])])
    return [(entry.token_id, entry.offset) for entry in echo.entries]


@pytest.mark.parametrize("text", [TEXT, None], ids=["as-text", "as-ids"])
def test_offsets_are_those_of_the_text(text: str | None) -> None:
    tokenizer = make_tokenizer(begin=False)
    assert [offset for _, offset in entries(tokenizer, text)] == [0, 1, 1, 2]


def test_a_token_put_before_the_text_takes_no_place_in_it() -> None:
    """All offsets were too large by the length of `<s>`, which is not part of the echo."""
    (first, *offsets) = entries(make_tokenizer(begin=True), TEXT)
    assert first == (1, 0)
    assert [offset for _, offset in offsets] == [0, 1, 1, 2]


def test_ids_are_echoed_with_their_special_tokens() -> None:
    (first, *offsets) = entries(make_tokenizer(begin=True), None)
    assert first == (1, 0)
    assert [offset for _, offset in offsets] == [5, 6, 6, 7]
