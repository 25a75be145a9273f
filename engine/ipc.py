"""The wire between front end and engine: msgpack frames over Unix sockets, no pickle anywhere.

A message is one ZeroMQ multipart message:

    frame 0   header: magic, version, number of buffers (little endian, 8 bytes)
    frame 1   msgpack body of a struct from `engine.messages`
    frame 2.. int32 buffers; only `Add` has two, prompt and output

Whoever receives binds and whoever sends connects, so a send never waits for the peer: it queues.
Sockets lie in a private folder (0700) of one engine process; a restart gets a new folder, so a
message of the old engine cannot reach the new one. Beside them lies the note of the step under way
(`engine.step_note`).
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from engine.errors import EngineError
from engine.messages import Add, FromEngine, ToEngine
from engine.step_note import StepNote, StepNoteFile

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 64 << 20  # all frames together; a prompt of 1M tokens has 4 MiB
MAX_SOCKET_PATH = 107  # bytes of sockaddr_un.sun_path, less the closing zero

_MAGIC = b"RTPB"
_HEADER = struct.Struct("<4sHH")
_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_REPORT_BACKLOG = 10_000  # reports that wait for a slow front end before the engine waits too

T = TypeVar("T")


class FrameError(EngineError):
    """What arrived is not a message of this version. Nothing of it was used."""


def encode(message: ToEngine | FromEngine) -> list[bytes]:
    """Frames of a message; raises FrameError if they exceed MAX_MESSAGE_BYTES."""
    buffers: list[bytes] = []
    if isinstance(message, Add):
        buffers = [message.prompt, message.output]
        message = msgspec.structs.replace(message, prompt=b"", output=b"")
    frames = [_HEADER.pack(_MAGIC, WIRE_VERSION, len(buffers)), _ENCODER.encode(message), *buffers]
    _check_size(frames)
    return frames


def decode_to_engine(frames: Sequence[bytes]) -> ToEngine:
    """A message for the engine. Raises FrameError on anything else."""
    body, buffers = _split(frames)
    message = _decode_body(_TO_ENGINE, body)
    if not isinstance(message, Add):
        _expect_buffers(message, buffers, 0)
        return message
    _expect_buffers(message, buffers, 2)
    if any(len(buffer) % 4 for buffer in buffers):
        raise FrameError("token buffer is not a whole number of int32 values")
    return msgspec.structs.replace(message, prompt=buffers[0], output=buffers[1])


def decode_from_engine(frames: Sequence[bytes]) -> FromEngine:
    """A message from the engine. Raises FrameError on anything else."""
    body, buffers = _split(frames)
    message = _decode_body(_FROM_ENGINE, body)
    _expect_buffers(message, buffers, 0)
    return message


def _split(frames: Sequence[bytes]) -> tuple[bytes, Sequence[bytes]]:
    """Body and buffers behind a header that says what it should."""
    _check_size(frames)
    if len(frames) < 2 or len(frames[0]) != _HEADER.size:
        raise FrameError("message has no header")
    magic, version, num_buffers = _HEADER.unpack(frames[0])
    if magic != _MAGIC:
        raise FrameError("message does not start with the magic bytes")
    if version != WIRE_VERSION:
        raise FrameError(f"message has wire version {version}, expected {WIRE_VERSION}")
    if num_buffers != len(frames) - 2:
        raise FrameError(f"message announces {num_buffers} buffers, carries {len(frames) - 2}")
    return frames[1], frames[2:]


def _decode_body(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"message body is not valid: {error}") from error


def _expect_buffers(message: object, buffers: Sequence[bytes], expected: int) -> None:
    if len(buffers) != expected:
        name = type(message).__name__
        raise FrameError(f"{name} carries {len(buffers)} buffers, expected {expected}")


def _check_size(frames: Sequence[bytes]) -> None:
    size = sum(len(frame) for frame in frames)
    if size > MAX_MESSAGE_BYTES:
        raise FrameError(f"message has {size} bytes, at most {MAX_MESSAGE_BYTES} may cross")


class FrontEndChannel:
    """The front end's two sockets, on an event loop, and the note of the step under way.

    One channel serves one engine process.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="rtpurbo-")  # mode 0700
        self._note = StepNoteFile(self.folder, create=True)
        self._context = zmq.asyncio.Context()
        self._receiver = self._context.socket(zmq.PULL)
        # A plain socket: sending only hands the frames to ZeroMQ's own thread. Without a
        # high-water mark that never blocks; the limit on queued requests bounds its memory.
        self._sender: zmq.Socket[bytes] = zmq.Socket(self._context, zmq.PUSH)
        self._sender.setsockopt(zmq.SNDHWM, 0)
        try:
            _bind(self._receiver, reports_path(self.folder))
            self._sender.connect(f"ipc://{requests_path(self.folder)}")
        except BaseException:
            self.close()
            raise

    def send(self, message: ToEngine) -> None:
        """Queue a message; never waits."""
        self._sender.send_multipart(encode(message), flags=zmq.NOBLOCK)

    async def receive(self) -> FromEngine:
        """The next message. Raises FrameError if it is not one."""
        return decode_from_engine(await self._receiver.recv_multipart())

    def step(self) -> StepNote | None:
        """The step that the engine computes; None between steps."""
        return self._note.read()

    def close(self) -> None:
        """Drop unsent messages, close both sockets and remove the folder."""
        self._sender.close(linger=0)
        self._receiver.close(linger=0)
        self._context.term()
        self._note.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class EngineChannel:
    """The engine's end of a `FrontEndChannel`, blocking, in the folder that the front end made."""

    def __init__(self, folder: str) -> None:
        self._note = StepNoteFile(folder)
        self._context = zmq.Context()
        self._receiver = self._context.socket(zmq.PULL)
        _bind(self._receiver, requests_path(folder))
        self._sender = self._context.socket(zmq.PUSH)
        self._sender.setsockopt(zmq.SNDHWM, _REPORT_BACKLOG)
        self._sender.connect(f"ipc://{reports_path(folder)}")

    def send(self, message: FromEngine) -> None:
        """Queue a message; waits only while the front end is thousands of messages behind."""
        self._sender.send_multipart(encode(message))

    def receive(self, timeout: float) -> list[ToEngine]:
        """All messages that have arrived; waits up to `timeout` seconds for the first one.

        Raises:
            FrameError: a frame is not a message of this version.
        """
        messages: list[ToEngine] = []
        if not self._receiver.poll(int(timeout * 1000)):
            return messages
        while self._receiver.poll(0):
            messages.append(decode_to_engine(self._receiver.recv_multipart()))
        return messages

    def note(self, step: StepNote | None) -> None:
        """Leave word of the step that comes now, None after it."""
        self._note.write(step)

    def close(self, linger: float = 1.0) -> None:
        """Close both sockets; waits up to `linger` seconds until queued messages have left."""
        self._receiver.close(linger=0)
        self._sender.close(linger=int(linger * 1000))
        self._context.term()


def requests_path(folder: str) -> str:
    """Socket on which the engine receives."""
    return str(Path(folder) / "requests")


def reports_path(folder: str) -> str:
    """Socket on which the front end receives."""
    return str(Path(folder) / "reports")


def _bind(receiver: zmq.Socket[bytes] | zmq.asyncio.Socket, path: str) -> None:
    """Bind at `path` with mode 0600 and a cap on what one frame may allocate."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise EngineError(
            f"socket path has {len(os.fsencode(path))} bytes, at most {MAX_SOCKET_PATH} fit; "
            "set TMPDIR to a shorter folder"
        )
    receiver.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
    receiver.bind(f"ipc://{path}")
    os.chmod(path, 0o600)
