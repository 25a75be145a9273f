"""Kernels that leave one wrong number behind, as a device or a compiler gone wrong might."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from kernels._launch import KernelLibrary

WRONG = 0x7F  # of every byte: a large number in all types of numbers


def break_kernel(
    monkeypatch: pytest.MonkeyPatch, library: KernelLibrary, kernel: str, field: str
) -> None:
    """After each launch of `kernel` the first numbers that `field` of its arguments points to are
    wrong; "keys 1" is the second of an array of pointers."""
    name, _, place = field.partition(" ")

    def spoil(which: str, args: ctypes.Structure) -> None:
        address = getattr(args, name, None) if which == kernel else None
        address = address[int(place)] if address is not None and place else address
        if address:
            ctypes.memset(address, WRONG, 8)

    launch, select, decode = library.launch, library.launch_select, library.launch_decode

    def launched(which: Any, args: ctypes.Structure, like: Any) -> None:
        launch(which, args, like)
        spoil(which, args)

    def selected(which: Any, args: Any, like: Any) -> None:
        select(which, args, like)
        spoil(which, args)

    def decoded(args: Any, like: Any) -> None:
        decode(args, like)
        spoil("sparse_decode", args)

    monkeypatch.setattr(library, "launch", launched)
    monkeypatch.setattr(library, "launch_select", selected)
    monkeypatch.setattr(library, "launch_decode", decoded)
