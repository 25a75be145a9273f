"""What the engine is computing, noted where the front end can read it after the engine's death.

The note lies in a file of the channel's folder that both processes map into memory. The engine
writes it before each step and wipes it afterwards: no message, no system call, and unlike a message
it cannot be lost when the process is killed a moment later. A note that is just being written reads
as none.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import msgspec

_FILE = "step"
_BYTES = 64 * 2**10  # a step of several thousand sequences; of a longer one there is no note
_LENGTH = struct.Struct("<I")


class StepNote(msgspec.Struct, array_like=True, frozen=True):
    """One step. Times are monotonic seconds."""

    began: float
    tokens: int  # to compute, prompt chunks included
    request_ids: list[int]


class StepNoteFile:
    """The mapped file. The front end makes it, the engine opens it."""

    def __init__(self, folder: str, *, create: bool = False) -> None:
        with (Path(folder) / _FILE).open("w+b" if create else "r+b") as file:
            if create:
                file.write(bytes(_BYTES))  # not a hole: a full disk must show here, not in a step
                file.flush()
            self._map = mmap.mmap(file.fileno(), _BYTES)

    def write(self, note: StepNote | None) -> None:
        """Replace the note; None wipes it. The length is written last."""
        _LENGTH.pack_into(self._map, 0, 0)
        if note is None:
            return
        body = msgspec.msgpack.encode(note)
        end = _LENGTH.size + len(body)
        if end <= _BYTES:
            self._map[_LENGTH.size : end] = body
            _LENGTH.pack_into(self._map, 0, len(body))

    def read(self) -> StepNote | None:
        """The step under way; None between steps, and when the file is closed."""
        if self._map.closed:
            return None
        (length,) = _LENGTH.unpack_from(self._map)
        if not 0 < length <= _BYTES - _LENGTH.size:
            return None
        body = self._map[_LENGTH.size : _LENGTH.size + length]
        try:
            return msgspec.msgpack.decode(body, type=StepNote)
        except msgspec.MsgspecError:
            return None

    def close(self) -> None:
        self._map.close()
