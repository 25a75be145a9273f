"""What the front end hands to an engine process at its start, and how their lives are tied.

The child's stdin carries one length-prefixed msgpack message and then stays open and silent: its
end means that the parent is gone. Nothing secret or long stands in the command line.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from typing import BinaryIO

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.ipc import WIRE_VERSION

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a child needs to become an engine."""

    config: EngineConfig
    folder: str  # of the sockets (engine.ipc)
    wire_version: int = WIRE_VERSION


def encode_launch(launch: Launch) -> bytes:
    """The bytes to write to the child's stdin."""
    body = msgspec.msgpack.encode(launch)
    return _LENGTH.pack(len(body)) + body


def read_launch(stream: BinaryIO) -> Launch:
    """Read what `encode_launch` wrote.

    Raises:
        EngineError: the stream ends early, is no such message, or is of another wire version.
    """
    prefix = stream.read(_LENGTH.size)
    if len(prefix) != _LENGTH.size:
        raise EngineError("launch message is missing; this process is started by the front end")
    (length,) = _LENGTH.unpack(prefix)
    if length > _MAX_BYTES:
        raise EngineError(f"launch message announces {length} bytes, at most {_MAX_BYTES} may come")
    body = stream.read(length)
    if len(body) != length:
        raise EngineError(f"launch message ends after {len(body)} of {length} bytes")
    try:
        launch = msgspec.msgpack.decode(body, type=Launch)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"launch message is not valid: {error}") from error
    if launch.wire_version != WIRE_VERSION:
        raise EngineError(
            f"front end speaks wire version {launch.wire_version}, this engine {WIRE_VERSION}"
        )
    return launch


def die_with_parent(stdin_fd: int = 0) -> None:
    """End this process when its parent ends, whatever the main thread is doing then.

    Two ways, because each has a hole: the kernel's parent-death signal is lost if the parent died
    before it was asked for, and the end of stdin is not seen while a native call holds the GIL.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    threading.Thread(target=_exit_at_eof, args=(stdin_fd,), name="parent", daemon=True).start()


def _exit_at_eof(fd: int) -> None:
    while os.read(fd, 4096):
        pass
    os._exit(1)
