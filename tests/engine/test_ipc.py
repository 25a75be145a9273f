"""The wire: what goes in comes out, and nothing else is ever accepted (F24, V31)."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ipc
from engine.errors import EngineError
from engine.ipc import (
    EngineChannel,
    FrameError,
    FrontEndChannel,
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

HEADER = struct.Struct("<4sHH")


def make_add(tokens: list[int], output: list[int] | None = None) -> Add:
    return Add(
        request_id=7,
        params=SamplingParams(seed=-(2**63), logit_bias={3: -100.0}, stop_token_ids=(1, 2)),
        prompt=array("i", tokens).tobytes(),
        output=array("i", output or []).tobytes(),
        arrival=12.5,
    )


TO_ENGINE: list[ToEngine] = [
    make_add([5, 2**31 - 1]),
    make_add([1], [2]),
    Abort([1, 2]),
    Shutdown(),
]
FROM_ENGINE: list[FromEngine] = [
    Failed("no such folder", kind="checkpoint"),
    Report(
        updates=[
            RequestUpdate(
                request_id=1,
                tokens=[4],
                logprobs=[TokenLogprobs(4, -0.5, [4, 5], [-0.5, -1.0])],
                prompt_logprobs=[None, TokenLogprobs(2, -1.0, [], [])],
                finish_reason="stop",
                stop_token=4,
                timing=Timing(0.1, None, None),
                attended=Attended(2, 30, 0.5),
            )
        ],
        stats=Stats(step=3, layer_attended_fraction={0: 0.25}),
    ),
]


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda m: type(m).__name__)
def test_messages_to_the_engine_survive_the_wire(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda m: type(m).__name__)
def test_messages_from_the_engine_survive_the_wire(message: FromEngine) -> None:
    assert decode_from_engine(encode(message)) == message


def test_prompts_travel_as_one_buffer_and_not_inside_the_body() -> None:
    message = make_add(list(range(1000)))
    assert encode(message)[2] == message.prompt
    assert len(encode(message)[1]) < 500


Damage = Callable[[list[bytes]], list[bytes]]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "nothing": (lambda f: [], "no header"),
    "header only": (lambda f: f[:1], "no header"),
    "short header": (lambda f: [f[0][:-1], *f[1:]], "no header"),
    "wrong magic": (lambda f: [b"HTTP" + f[0][4:], *f[1:]], "magic"),
    "older version": (lambda f: [HEADER.pack(b"RTPB", 0, 2), *f[1:]], "wire version 0, expected 1"),
    "newer version": (lambda f: [HEADER.pack(b"RTPB", 2, 2), *f[1:]], "wire version 2, expected 1"),
    "buffer missing": (lambda f: f[:-1], "announces 2 buffers, carries 1"),
    "buffer too many": (lambda f: [*f, b""], "announces 2 buffers, carries 3"),
    "truncated body": (lambda f: [f[0], f[1][:-3], *f[2:]], "body is not valid"),
    "pickle body": (lambda f: [f[0], b"\x80\x04N.", *f[2:]], "body is not valid"),
    "half a token": (lambda f: [*f[:2], f[2][:-1], f[3]], "whole number of int32"),
    "no buffers at all": (lambda f: [HEADER.pack(b"RTPB", 1, 0), f[1]], "Add carries 0 buffers"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_f24_damaged_frames_are_refused_with_the_reason(name: str) -> None:
    damage, reason = DAMAGES[name]
    with pytest.raises(FrameError, match=reason):
        decode_to_engine(damage(encode(make_add([1, 2, 3]))))


def test_f24_messages_of_the_other_direction_are_refused() -> None:
    with pytest.raises(FrameError):
        decode_to_engine(encode(Failed("x")))
    with pytest.raises(FrameError):
        decode_from_engine(encode(Abort([1])))


def test_f24_oversize_messages_are_refused_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = encode(make_add(list(range(100))))
    monkeypatch.setattr(ipc, "MAX_MESSAGE_BYTES", 300)
    with pytest.raises(FrameError, match="at most 300"):
        decode_to_engine(frames)
    with pytest.raises(FrameError, match="at most 300"):
        encode(make_add(list(range(100))))


@given(frames=st.lists(st.binary(max_size=40), max_size=5), keep_header=st.booleans())
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_never_raise_anything_but_frame_errors(
    frames: list[bytes], keep_header: bool
) -> None:
    if keep_header:
        frames = [HEADER.pack(b"RTPB", 1, max(len(frames) - 1, 0)), *frames]
    for decode in (decode_to_engine, decode_from_engine):
        try:
            decode(frames)
        except FrameError:
            continue


@pytest.fixture
def folder() -> Iterator[list[str]]:
    """Where a test notes the folders of its channels."""
    created: list[str] = []
    yield created
    assert not any(Path(path).exists() for path in created), "close removes the folder"


def test_channel_is_private_ordered_and_leaves_nothing(folder: list[str]) -> None:
    async def talk() -> None:
        front = FrontEndChannel()
        folder.append(front.folder)
        engine = EngineChannel(front.folder)
        try:
            assert stat.S_IMODE(os.stat(front.folder).st_mode) == 0o700
            for path in (ipc.requests_path(front.folder), ipc.reports_path(front.folder)):
                assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            adds = [make_add([n] * 1000) for n in range(20)]
            for add in adds:
                front.send(add)
            received: list[ToEngine] = []
            while len(received) < len(adds):
                received += engine.receive(timeout=10)
            assert received == adds
            for message in FROM_ENGINE:
                engine.send(message)
                async with asyncio.timeout(10):
                    assert await front.receive() == message
        finally:
            engine.close()
            front.close()

    asyncio.run(talk())


def test_receive_returns_empty_when_nothing_comes(folder: list[str]) -> None:
    async def talk() -> None:
        front = FrontEndChannel()
        folder.append(front.folder)
        engine = EngineChannel(front.folder)
        try:
            assert engine.receive(timeout=0.01) == []
        finally:
            engine.close()
            front.close()

    asyncio.run(talk())


def test_f24_bad_frames_on_the_socket_raise_on_the_reading_side(folder: list[str]) -> None:
    async def talk() -> None:
        front = FrontEndChannel()
        folder.append(front.folder)
        engine = EngineChannel(front.folder)
        context = zmq.Context()
        try:
            for path in (ipc.requests_path(front.folder), ipc.reports_path(front.folder)):
                with context.socket(zmq.PUSH) as sender:
                    sender.connect(f"ipc://{path}")
                    sender.send_multipart([b"GET / HTTP/1.1", b"Host: x"])
            with pytest.raises(FrameError):
                async with asyncio.timeout(10):
                    await front.receive()
            with pytest.raises(FrameError):
                engine.receive(timeout=10)
        finally:
            context.term()
            engine.close()
            front.close()

    asyncio.run(talk())


def test_a_socket_path_that_does_not_fit_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async def build() -> None:
        FrontEndChannel()

    with pytest.raises(EngineError, match="set TMPDIR to a shorter folder"):
        asyncio.run(build())
    assert not list(long.iterdir())
