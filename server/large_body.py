"""Large bodies in small steps.

A JSON parser holds the interpreter until it is through, in whatever thread it runs: 16 MiB of ids
stop all streams and health probes for most of a second, 16 MiB of `[],` for four. So what makes a
body large by right, long texts and long lists of ids, is cut out here and read piece by piece, and
the number of values in the thin rest is bounded. The rest is parsed like any body, which finds
whatever is wrong with it; a cut that went wrong on malformed JSON cannot make it valid.
"""

from __future__ import annotations

import re
import secrets
from array import array
from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import pydantic_core

from server.errors import ApiError, invalid

SMALL_BODY = 64 * 2**10  # bytes that are parsed at once, in milliseconds
MAX_VALUES = 100_000  # of the thin rest; 128 prompts of short lists are fewer
_LONG_TEXT = 16 * 2**10  # bytes
_LONG_LIST = 1024  # bytes
_PIECE = 16 * 2**10  # bytes; a millisecond or two

_ID_LIST = b"0123456789, \t\r\n"
_IDS = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]])
# Whole characters of a JSON string, as many as there are: an escape, a pair of surrogates or a
# character of several bytes is never cut.
_TEXT = re.compile(
    rb"""(?:[^"\\\x80-\xff]++
    | [\xc2-\xdf][\x80-\xbf] | [\xe0-\xef][\x80-\xbf]{2} | [\xf0-\xf4][\x80-\xbf]{3}
    | \\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4} | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
    | \\[^u])*+""",
    re.VERBOSE,
)


class CutValues:
    """What was cut out of a body, by placeholders that no client can guess."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(16)
        self._values: dict[str, str | array[int]] = {}
        self._fields: dict[str, str | None] = {}

    def put(self, value: str | array[int], field: str | None) -> bytes:
        """Keep a value of `field`; returns the JSON to stand in its place."""
        placeholder = f"{self._prefix}{len(self._values)}"
        self._values[placeholder] = value
        self._fields[placeholder] = field
        return f'"{placeholder}"'.encode()

    def restore(self, value: Any) -> Any:
        """A parsed value with what was cut out of it."""
        if isinstance(value, str):
            return self._values.pop(value, value)
        if isinstance(value, list):
            return [self.restore(item) for item in value]
        if isinstance(value, dict):
            return {name: self.restore(item) for name, item in value.items()}
        return value

    def check_empty(self) -> None:
        """Raises ApiError (400) for values that nobody asked for, which no field may hold."""
        for placeholder in self._values:
            field = self._fields[placeholder]
            raise invalid(f"{field or 'a field'} is too long", field, "field_too_long")


def cut_body(raw: bytes, fields: Collection[str]) -> tuple[bytes, CutValues]:
    """The thin rest of a JSON body, and what was cut out of it.

    `fields` are names of the body's fields, one of which an error names.

    Raises:
        ApiError: 400; not JSON, a list of anything but ids, or too many values.
    """
    cutter = _Cutter(raw, fields)
    return cutter.cut(), cutter.values


class _Cutter:
    """One pass over a body, from string to string and from list to list."""

    def __init__(self, raw: bytes, fields: Collection[str]) -> None:
        self.values = CutValues()
        self._raw = raw
        self._fields = fields
        self._field: str | None = None  # the one that was begun last
        self._thin: list[bytes] = []  # stands for [0, _kept)
        self._kept = 0
        self._count = 0
        self._found: dict[bytes, int] = {}

    def cut(self) -> bytes:
        pos = 0
        while pos < len(self._raw):
            quote, bracket = self._next(b'"', pos), self._next(b"[", pos)
            start = min(quote, bracket)
            self._count_values(pos, start)
            if start == len(self._raw):
                break
            pos = self._string(start) if quote < bracket else self._list(start)
        return b"".join([*self._thin, self._raw[self._kept :]])

    def _next(self, byte: bytes, pos: int) -> int:
        """Where `byte` is found at or after `pos`, which never decreases; else the end."""
        found = self._found.get(byte, -1)
        if found < pos:
            found = self._raw.find(byte, pos)
            self._found[byte] = found = len(self._raw) if found < 0 else found
        return found

    def _count_values(self, start: int, end: int) -> None:
        self._count += 1 + self._raw.count(b",", start, end)
        if self._count > MAX_VALUES:
            message = f"the body holds more than {MAX_VALUES} values"
            raise invalid(message, self._field, "too_many_values")

    def _string(self, start: int) -> int:
        """Pass over a string, or cut it out; returns where it ends."""
        ends = [start + 1]
        while (end := self._end_of_text(ends[-1])) > ends[-1]:
            ends.append(end)
        if self._raw[end : end + 1] != b'"':
            raise _not_json()
        if end - start > _LONG_TEXT:
            pieces = [self._text(first, last) for first, last in pairwise(ends)]
            self._replace(start, end + 1, "".join(pieces))
        elif end - start < 64 and self._raw[end + 1 : end + 2] in (b":", b" "):
            name = self._raw[start + 1 : end].decode(errors="replace")
            self._field = name if name in self._fields else self._field
        return end + 1

    def _end_of_text(self, start: int) -> int:
        match = _TEXT.match(self._raw, start, start + _PIECE)
        assert match is not None, "the pattern matches nothing, too"
        return match.end()

    def _text(self, start: int, end: int) -> str:
        try:
            text: str = pydantic_core.from_json(b'"' + self._raw[start:end] + b'"')
        except ValueError:
            raise _not_json() from None
        return text

    def _list(self, start: int) -> int:
        """Pass over a list's begin, or over a whole list of numbers, or cut that out."""
        end = self._next(b"]", start)
        inner = min(self._next(b'"', start), self._next(b"[", start + 1))
        if inner < end or end == len(self._raw):
            return start + 1
        if end - start < _LONG_LIST or not self._holds_ids(start + 1, end):
            self._count_values(start, end)
        else:
            self._replace(start, end + 1, self._ids(start + 1, end))
        return end + 1

    def _holds_ids(self, start: int, end: int) -> bool:
        pieces = (self._raw[at : min(at + _PIECE, end)] for at in range(start, end, _PIECE))
        return not any(piece.translate(None, _ID_LIST) for piece in pieces)

    def _ids(self, start: int, end: int) -> array[int]:
        ids = array("i")
        last = start
        while last < end:
            last = end
            if end - start > _PIECE:
                last = self._raw.rfind(b",", start, start + _PIECE)
            piece = self._raw[start : max(last, start)]
            if not piece.strip():  # between two commas, at an end, or longer than any number
                raise _not_json()
            try:
                ids.extend(_IDS.decode(b"[" + piece + b"]"))
            except msgspec.ValidationError:
                field = self._field or "body"
                raise invalid(f"{field}: an id is larger than 31 bits", self._field) from None
            except msgspec.DecodeError:
                raise _not_json() from None
            start = last + 1
        return ids

    def _replace(self, start: int, end: int, value: str | array[int]) -> None:
        self._thin += [self._raw[self._kept : start], self.values.put(value, self._field)]
        self._kept = end


def _not_json() -> ApiError:
    return invalid("the body is not valid JSON", code="invalid_json")
