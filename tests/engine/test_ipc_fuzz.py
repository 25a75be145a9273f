"""Frames that were damaged on the way: a message, or a FrameError, and never more memory (F24)."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ipc import (
    WIRE_VERSION,
    FrameError,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from engine.messages import (
    Abort,
    Add,
    Attended,
    Failed,
    FromEngine,
    Report,
    RequestUpdate,
    Shutdown,
    Stats,
    Timing,
    ToEngine,
    TokenLogprobs,
)
from engine.request import SamplingParams
from tests.fuzzing import draws

# What a decoder may take at most: the message once more, as objects. 64 for a list element of one
# byte, and a little that does not depend on the message.
BYTES_PER_BYTE, BYTES_ALWAYS = 64, 64 * 1024

# Array and map of 4G entries, a byte that msgpack never uses, and arrays in arrays without end.
INSERTED = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc1", b"\x91" * 5000]

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=6)
buffers = token_lists.map(lambda tokens: array("i", tokens).tobytes())
ids = st.integers(0, 2**63 - 1)
logprobs = st.builds(
    TokenLogprobs,
    token_id=ids,
    logprob=st.floats(allow_nan=False),
    top_ids=token_lists,
    top_logprobs=st.lists(st.floats(-50, 0), max_size=4),
)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 2**20),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=token_lists.map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
)
to_engine: st.SearchStrategy[ToEngine] = st.one_of(
    st.builds(
        Add,
        request_id=ids,
        params=params,
        prompt=buffers,
        output=buffers,
        arrival=st.floats(0, 1e9),
    ),
    st.builds(Abort, st.lists(ids, max_size=5)),
    st.builds(Shutdown),
)
updates = st.builds(
    RequestUpdate,
    request_id=ids,
    tokens=token_lists,
    logprobs=st.lists(logprobs, max_size=2),
    prompt_logprobs=st.lists(st.none() | logprobs, max_size=2),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_token=st.none() | ids,
    timing=st.none() | st.builds(Timing, st.none() | st.floats(0, 1e6)),
    attended=st.none() | st.builds(Attended, ids, ids, st.floats(0, 1)),
)
from_engine: st.SearchStrategy[FromEngine] = st.one_of(
    st.builds(Failed, st.text(max_size=20)),
    st.builds(Report, updates=st.lists(updates, max_size=3), stats=st.builds(Stats)),
)


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[ToEngine | FromEngine]) -> list[bytes]:
    """A real message after a few accidents with its bytes and its frames."""
    frames = encode(draw(messages))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(frames) - 1, 0)))
        frame = frames[place] if frames else b""
        at = draw(st.integers(0, len(frame)))
        accident = draw(st.integers(0, 6))
        if accident == 0:  # some bytes become others
            some = draw(st.binary(min_size=1, max_size=5))
            frames[place : place + 1] = [frame[:at] + some + frame[at + len(some) :]]
        elif accident == 1:  # the rest is lost
            frames[place : place + 1] = [frame[:at]]
        elif accident == 2:  # bytes come in between, such as lengths of gigabytes
            some = draw(st.sampled_from(INSERTED))
            frames[place : place + 1] = [frame[:at] + some + frame[at:]]
        elif accident == 3:
            del frames[place : place + 1]
        elif accident == 4:
            frames.insert(place, frame)
        elif accident == 5:
            frames.reverse()
        else:
            frames.insert(at, draw(st.binary(max_size=12)))
    return frames


@draws(250)
@given(damaged(to_engine))
def test_f24_fuzz_damaged_frames_to_the_engine(frames: list[bytes]) -> None:
    try:
        message = decode_to_engine(frames)
    except FrameError:
        return
    # Bytes are compared, since a damaged number may be NaN.
    assert encode(decode_to_engine(encode(message))) == encode(message)
    if isinstance(message, Add):
        assert len(message.prompt) % 4 == len(message.output) % 4 == 0


@draws(250)
@given(damaged(from_engine))
def test_f24_fuzz_damaged_frames_from_the_engine(frames: list[bytes]) -> None:
    try:
        message = decode_from_engine(frames)
    except FrameError:
        return
    assert encode(decode_from_engine(encode(message))) == encode(message)


@draws(80)
@given(st.one_of(to_engine, from_engine))
def test_f24_fuzz_every_message_survives_its_own_direction_only(
    message: ToEngine | FromEngine,
) -> None:
    """Both directions tag their messages, so that neither side takes its own for the other's."""
    frames = encode(message)
    forward = isinstance(message, Add | Abort | Shutdown)
    right, wrong = decode_to_engine, decode_from_engine
    if not forward:
        right, wrong = wrong, right  # type: ignore[assignment]
    assert right(frames) == message
    with pytest.raises(FrameError):
        wrong(frames)


@draws(100)
@given(damaged(to_engine | from_engine))
def test_f24_fuzz_a_lying_length_takes_no_memory(frames: list[bytes]) -> None:
    size = sum(map(len, frames))
    for decode in (decode_to_engine, decode_from_engine):
        tracemalloc.start()
        try:
            decode(frames)
        except FrameError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak <= BYTES_PER_BYTE * size + BYTES_ALWAYS


@draws(40)
@given(st.integers(0, 2**16 - 1).filter(lambda version: version != WIRE_VERSION))
def test_f24_fuzz_no_other_version_is_guessed_at(version: int) -> None:
    frames = encode(Abort([1]))
    frames[0] = frames[0][:4] + version.to_bytes(2, "little") + frames[0][6:]
    with pytest.raises(FrameError, match=f"wire version {version}, expected {WIRE_VERSION}"):
        decode_to_engine(frames)
