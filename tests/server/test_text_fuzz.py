"""Text that leaves while it is made: the same however tokens and updates are cut (B23, B43)."""

from __future__ import annotations

from itertools import groupby, pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.client import Generation
from engine.embedded import embedded_model_path
from engine.messages import RequestUpdate, TokenLogprobs
from engine.request import FinishReason, SamplingParams
from engine.tokenizer import Tokenizer
from server.choice import Choice
from server.detokenizer import make_detokenizer
from server.logprobs import LogprobEntry
from server.stop_matcher import StopMatcher
from tests.fuzzing import draws
from tests.server.test_detokenizer import BYTES, PIECES

EMBEDDED = Tokenizer.from_folder(embedded_model_path())
STOP_ID = 1

BYTE_IDS = {BYTES.token_bytes(token_id)[0]: token_id for token_id in range(64, 320)}

# Ids of bytes that are often no character, in tokenizers of two kinds.
byte_ids = st.lists(
    st.integers(0, 255).map(lambda byte: BYTE_IDS[byte])
    | st.sampled_from("aé漢\U0001f600").map(lambda letter: BYTE_IDS[letter.encode()[0]]),
    max_size=30,
)
piece_ids = st.lists(
    st.integers(0, 5)
    | st.integers(0x80, 0xFF).map(lambda byte: 6 + byte)
    | st.sampled_from([6 + ord("a"), 6 + 0xF0, 6 + 0x9F, 6 + 0x98, 6 + 0x80]),
    max_size=30,
)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = make_detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@draws(80)
@given(st.lists(st.integers(0, EMBEDDED.vocab_size + 5), max_size=30))
def test_b43_fuzz_any_ids_of_the_embedded_model(ids: list[int]) -> None:
    """Special ids between the bytes of a character included."""
    pieces = streamed(EMBEDDED, ids)
    assert "".join(pieces) == EMBEDDED.decode(ids, skip_special_tokens=True)


@draws(80)
@given(byte_ids)
def test_b43_fuzz_a_replacement_leaves_only_where_no_byte_could_mend_it(ids: list[int]) -> None:
    """After every token: what has left is what decoding with any continuation begins with."""
    pieces = streamed(BYTES, ids)
    raw = b"".join(BYTES.token_bytes(token_id) for token_id in ids)
    sent = ""
    for count, piece in enumerate(pieces[:-1], 1):
        sent += piece
        for more in (b"", b"\x80", b"\x9f\x98\x80", b"a"):
            whole = (raw[:count] + more).decode("utf-8", "replace")
            assert whole.startswith(sent)
    assert "".join(pieces) == raw.decode("utf-8", "replace")


@draws(80)
@given(piece_ids)
def test_b43_fuzz_runs_of_fallback_bytes_that_are_no_text(ids: list[int]) -> None:
    """Each run of byte tokens is decoded as bytes, and costs its neighbours nothing."""
    want = ""
    for is_bytes, run in groupby(ids, key=lambda token_id: token_id >= 6):
        if is_bytes:
            want += bytes(token_id - 6 for token_id in run).decode("utf-8", "replace")
        else:
            anchor = [6 + ord("A")] if want else []  # a first space is trimmed at the start alone
            want += PIECES.decode([*anchor, *run])[len(anchor) :]
    assert "".join(streamed(PIECES, ids)) == want


@draws(100)
@given(st.text("abX", max_size=20), st.lists(st.text("abX", min_size=1, max_size=4), max_size=4))
def test_b23_fuzz_no_letter_is_held_longer_than_a_stop_string_could_need(
    text: str, stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    sent = ""
    for count, letter in enumerate(text, 1):
        sent += matcher.push(letter)
        if matcher.matched:
            break
        begun = [n for s in stops for n in range(1, len(s)) if text[:count].endswith(s[:n])]
        assert count - len(sent) == max(begun, default=0)


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[int], list[int], list[str], FinishReason, int]:
    """Tokens, places to cut them into updates, stop strings, the engine's end, min_tokens."""
    letters = st.sampled_from([BYTE_IDS[byte] for byte in "abXé\U0001f600".encode()])
    tokens = draw(st.lists(letters, min_size=1, max_size=24))
    cuts = draw(st.lists(st.integers(1, len(tokens)), max_size=6))
    stops = draw(st.lists(st.text("abXé", min_size=1, max_size=3), max_size=3))
    finish: FinishReason = draw(st.sampled_from(["stop", "length"]))
    if finish == "stop":
        tokens = [*tokens[:-1], STOP_ID]  # the engine ends with the first one
    return tokens, cuts, stops, finish, draw(st.integers(0, 4))


def answered(
    tokens: list[int], cuts: list[int], stops: list[str], finish: FinishReason, min_tokens: int
) -> tuple[str, list[tuple[int, int]], str | None, int]:
    """Text, log-probability entries (id, offset), finish reason and token count of one choice."""
    aborted: list[int] = []
    params = SamplingParams(max_tokens=len(tokens), min_tokens=min_tokens, logprobs=0)
    generation = Generation(1, [64], params, aborted.append)
    choice = Choice(0, generation, BYTES, stops)
    entries: list[LogprobEntry] = []
    text = ""
    edges = sorted({0, len(tokens), *cuts})
    for start, end in pairwise(edges):
        last = end == len(tokens)
        update = RequestUpdate(
            request_id=1,
            tokens=tokens[start:end],
            logprobs=[TokenLogprobs(token, -1.0, [], []) for token in tokens[start:end]],
            finish_reason=finish if last else None,
            stop_token=tokens[-1] if last and finish == "stop" else None,
        )
        delta = choice.push(update)
        text += delta.text
        entries += delta.logprobs
        if choice.finish_reason is not None:
            break
    assert choice.finish_reason is not None
    places = [(entry.token_id, entry.offset) for entry in entries]
    return text, places, choice.finish_reason, choice.generated


@draws(150)
@given(cut())
def test_b25_fuzz_a_choice_does_not_depend_on_how_its_tokens_came(
    case: tuple[list[int], list[int], list[str], FinishReason, int],
) -> None:
    """One token an update, all in one, or merged anyhow: as after a pause of the engine."""
    tokens, cuts, stops, finish, min_tokens = case
    one_by_one = list(range(1, len(tokens)))
    want = answered(tokens, one_by_one, stops, finish, min_tokens)
    assert answered(tokens, cuts, stops, finish, min_tokens) == want
    assert answered(tokens, [], stops, finish, min_tokens) == want
    if min_tokens == 0:
        assert not any(stop in want[0] for stop in stops), "a stop string left"
