"""Rows B15 to B51 and B79: what generation does with odd but legal requests."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.server.event_stream import stream, texts
from tests.server.live_server import LiveServer


def script(server: LiveServer, prompt: str, *tokens: str | bytes) -> None:
    """Make the toy model answer `prompt` with these tokens, given as text or raw bytes."""
    pieces: list[int] = []
    for token in tokens:
        raw = token.encode() if isinstance(token, str) else token
        pieces.extend(next(i for i in range(320) if _bytes(server, i) == bytes([b])) for b in raw)
    server.engine.scripts[tuple(server.tokenizer.encode(prompt))] = pieces


def _bytes(server: LiveServer, token_id: int) -> bytes:
    return server.tokenizer.token_bytes(token_id) if token_id >= 64 else b""


def test_b15_greedy_choices_are_equal_and_sampled_ones_differ(server: LiveServer) -> None:
    greedy = server.post(prompt="a", n=3, temperature=0, max_tokens=8).json()
    assert [choice["index"] for choice in greedy["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in greedy["choices"]}) == 1
    sampled = server.post(prompt="a", n=3, seed=1, max_tokens=8).json()
    assert len({choice["text"] for choice in sampled["choices"]}) == 3
    assert sampled["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 24,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_b17_zero_logprobs_reports_the_token_only(server: LiveServer) -> None:
    logprobs = server.post(prompt="a", logprobs=0, max_tokens=3).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 3
    assert logprobs["top_logprobs"] is None
    assert logprobs["text_offset"] == [0, 1, 2]


def test_b19_minus_infinity_becomes_a_number(server: LiveServer) -> None:
    server.engine.minus_infinity = True
    bodies: list[dict[str, Any]] = [{"logprobs": 2}, {"logprobs": 2, "echo": True}]
    for body in bodies:
        answer = server.post(prompt="ab", max_tokens=2, **body)
        assert "Infinity" not in answer.text
        logprobs = answer.json()["choices"][0]["logprobs"]
        assert set(logprobs["token_logprobs"]) - {None} == {-9999.0}


STOPS: dict[str, tuple[str, list[str], str, int]] = {
    # generated text, stops, expected text, tokens that count
    "inside": ("hello world", ["lo w"], "hel", 7),
    "overlapping": ("aXXY", ["XXY", "XY"], "a", 4),
    "the earlier complete one wins": ("abcd", ["abcd", "bc"], "a", 3),
    "first output": ("stop", ["s"], "", 1),
    "never": ("abc", ["zzz"], "abc", 3),
}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("streamed", [False, True])
def test_b23_stop_strings(server: LiveServer, name: str, streamed: bool) -> None:
    generated, stops, expected, tokens = STOPS[name]
    script(server, "p", generated)
    body: dict[str, Any] = {"prompt": "p", "stop": stops, "max_tokens": len(generated)}
    if streamed:
        body["stream_options"] = {"include_usage": True}
        events = stream(server, **body)
        assert texts(events)[0] == expected
        usage = events[-2]["usage"]
        finish = [
            e["choices"][0]["finish_reason"] for e in events if isinstance(e, dict) and e["choices"]
        ]
        reason = finish[-1]
        assert finish[:-1] == [None] * (len(finish) - 1)
    else:
        answer = server.post(**body).json()
        assert answer["choices"][0]["text"] == expected
        usage, reason = answer["usage"], answer["choices"][0]["finish_reason"]
    assert usage["completion_tokens"] == tokens
    assert reason == ("length" if name == "never" else "stop")


def test_b23_the_engine_stops_too(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    script(server, "p", "abc", "x" * 200)
    before = len(server.engine.aborted)
    monkeypatch.setattr(server.engine, "pause_after", 3)
    server.post(prompt="p", stop="b", max_tokens=200)
    server.until(lambda: len(server.engine.aborted) == before + 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_b25_a_stop_cut_by_max_tokens_is_sent(server: LiveServer, streamed: bool) -> None:
    script(server, "p", "abcSTO", "P")
    body: dict[str, Any] = {"prompt": "p", "stop": ["STOP"], "max_tokens": 6}
    if streamed:
        assert texts(stream(server, **body))[0] == "abcSTO"
    else:
        choice = server.post(**body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abcSTO", "length")


def test_b31_seeds_reproduce_alone_and_together(server: LiveServer) -> None:
    alone = server.post(prompt="a", seed=5, max_tokens=12).json()["choices"][0]["text"]
    again = server.post(prompt=["b", "a"], seed=5, max_tokens=12).json()["choices"][1]["text"]
    other = server.post(prompt="a", seed=6, max_tokens=12).json()["choices"][0]["text"]
    assert alone == again
    assert alone != other


def test_b43_characters_split_over_tokens(server: LiveServer) -> None:
    script(server, "p", "x", "\U0001f469".encode()[:2], "\U0001f469".encode()[2:], "y", b"\xf0\x9f")
    events = stream(server, prompt="p", max_tokens=8)
    pieces = [c["text"] for e in events if isinstance(e, dict) for c in e["choices"] if c["text"]]
    assert pieces == ["x", "\U0001f469", "y", "\ufffd"]
    whole = server.post(prompt="p", max_tokens=8).json()["choices"][0]["text"]
    assert whole == "".join(pieces)


@pytest.mark.parametrize("stop", [None, ["c"]])
def test_b51_usage_comes_last_before_done(server: LiveServer, stop: list[str] | None) -> None:
    script(server, "p", "abcdef")
    options = {"include_usage": True}
    events = stream(server, prompt="p", stop=stop, max_tokens=6, stream_options=options)
    assert events[-1] == "data: [DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == (3 if stop else 6)
    assert events[-2]["metrics"]["attended_fraction"] == pytest.approx(0.1)
    assert all("usage" not in event for event in events[:-2] if isinstance(event, dict))


def test_b79_the_same_prompt_many_times(server: LiveServer) -> None:
    server.engine.queue_limit = 1000
    answer = server.post(prompt=["same"] * 128, temperature=0, max_tokens=3).json()
    assert len(answer["choices"]) == 128
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    assert answer["usage"]["prompt_tokens"] == 4 * 128


def test_timings_are_reported(server: LiveServer) -> None:
    """Phases by the engine's clock, which the toy makes up; the first token as it came here."""
    begun = time.monotonic()
    metrics = server.post(prompt="a", max_tokens=4, ignore_eos=True).json()["metrics"]
    assert 0 < metrics.pop("time_to_first_token_seconds") < time.monotonic() - begun
    assert metrics == {
        "queue_seconds": pytest.approx(0.001),
        "prefill_seconds": pytest.approx(0.5),
        "decode_seconds": pytest.approx(0.03),
        "attended_tokens_mean": pytest.approx(20.0),
        "attended_fraction": pytest.approx(0.1),
    }
    first = server.post(prompt="a", max_tokens=1, ignore_eos=True).json()["metrics"]
    assert first["attended_fraction"] is None, "one token comes from the prefill: nothing selected"


def test_streams_and_answers_agree(server: LiveServer) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "ab", "logprobs": 2},
        {"prompt": "ab", "logprobs": 1, "echo": True},
        {"prompt": ["a", "b"], "n": 2, "seed": 3, "stop": ["e", ". "]},
        {"prompt": [70, 71], "echo": True, "max_tokens": 0},
    ]
    for body in bodies:
        settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0.5, "seed": 9, **body}
        whole = server.post(**settings).json()
        events = stream(server, **settings, stream_options={"include_usage": True})
        assert events[-2]["usage"] == whole["usage"]
        for choice in whole["choices"]:
            assert texts(events).get(choice["index"], "") == choice["text"]
            parts = [
                c["logprobs"]
                for e in events
                if isinstance(e, dict)
                for c in e["choices"]
                if c["index"] == choice["index"] and c["logprobs"]
            ]
            for key, values in (choice["logprobs"] or {}).items():
                assert [x for part in parts for x in part[key]] == values
