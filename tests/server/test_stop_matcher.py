"""Stop strings: the same cut however the text arrives, and never a part of one sent."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from server.stop_matcher import StopMatcher

ALPHABET = st.text(alphabet="abX", max_size=30)
STOPS = st.lists(st.text(alphabet="abX", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read letter by letter; cut at the match that is complete first."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(ALPHABET, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_the_cut_does_not_depend_on_the_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    sent = ""
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, stop in pairwise(edges):
        sent += matcher.push(text[start:stop])
    want, matched = expected(text, stops)
    assert matcher.matched == matched
    assert want.startswith(sent), "nothing of a stop string may leave"
    assert sent + matcher.flush() == want


def test_text_that_cannot_begin_a_stop_is_not_held() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("abE", "x", "EN", "E", "ND")] == [
        "ab",
        "Ex",
        "",
        "EN",
        "",
    ]
    assert matcher.matched


def test_after_a_match_nothing_leaves() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""
