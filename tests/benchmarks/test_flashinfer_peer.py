"""FlashInfer as a peer: wired as its API wants it, checked before it is timed, optional."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.flashinfer_peer import FlashInfer
from benchmarks.peer_check import PeerError, compare_last_token
from tests.benchmarks import fake_flashinfer
from tests.benchmarks.fake_flashinfer import Module

CPU = torch.device("cpu")
DECODE, FULL, WINDOWED = ("fa2", False), ("fa3", False), ("fa3", True)


def install(
    monkeypatch: pytest.MonkeyPatch,
    prefill: type = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper,
    build: Callable[[Module], object] | None = None,
    prebuilt: frozenset[Module] = frozenset(),
) -> list[Module]:
    """Put the fake in the library's place; the modules that were compiled."""
    built: list[Module] = []
    for name, module in fake_flashinfer.modules(build or built.append, prefill, prebuilt).items():
        monkeypatch.setitem(sys.modules, name, module)
    return built


def test_answers_of_all_calls_are_those_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    built = install(monkeypatch)
    peer = FlashInfer.make(CPU)
    assert sorted(built) == [DECODE, FULL, WINDOWED]
    facts = peer.facts()
    assert facts["version"] == "0.6.8"
    assert facts["build_seconds"] >= 0


def test_modules_that_came_with_the_library_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = install(monkeypatch, prebuilt=frozenset({DECODE, WINDOWED}))
    FlashInfer.make(CPU)
    assert built == [FULL]


def test_modules_are_compiled_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another they took a GPU host four minutes: none is ready before all have begun."""
    all_have_begun = threading.Barrier(3)
    install(monkeypatch, build=lambda module: all_have_begun.wait(30))
    FlashInfer.make(CPU)


def test_layers_of_a_decode_graph_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    peer = FlashInfer.make(CPU)
    caches = [(torch.randn(6, 2, 64, 16), torch.randn(6, 2, 64, 16)) for _ in range(3)]
    caches = [(k.bfloat16(), v.bfloat16()) for k, v in caches]
    q = torch.randn(2, 4, 16).bfloat16()
    calls = peer.decode_calls(q, caches, torch.tensor([[4, 0, 2], [1, 5, 3]]))
    first = [call() for call in calls]
    assert len(calls) == 3
    assert all(isinstance(out, Tensor) for out in first)
    wrapper = inspect.getclosurevars(calls[0]).nonlocals["wrapper"]
    assert wrapper.plans == 1


class ForgetsItsWindow(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper):
    def run(self, q: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        self.window_left = -1
        return super().run(q, cache, out=out)


class OneTooWide(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper):
    def run(self, q: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        self.window_left += self.window_left >= 0
        return super().run(q, cache, out=out)


class WritesNothing(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper):
    def run(self, q: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        assert out is not None
        return out


@pytest.mark.parametrize(
    ("prefill", "what"),
    [
        (ForgetsItsWindow, "^windowed prefill is off by"),
        (OneTooWide, "^windowed prefill is off by"),
        (WritesNothing, "^prefill is off by nan"),
    ],
)
def test_what_computes_something_else_is_no_peer(
    prefill: type, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, prefill)
    with pytest.raises(PeerError, match=what):
        FlashInfer.make(CPU)


@pytest.mark.parametrize("forgotten", [0, 1, 64])
def test_a_long_prompt_is_judged_by_its_last_token(forgotten: int) -> None:
    """A kernel whose numbers run over computes something else at some length only."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tokens, pages = 300, torch.tensor([3, 0, 4, 1, 2])
    q_THD, cache = random(tokens, 4, 16), (random(5, 2, 64, 16), random(5, 2, 64, 16))
    k_NCD, v_NCD = (part[pages].transpose(0, 1).flatten(1, 2)[:, :tokens] for part in cache)
    out_THD = torch.zeros_like(q_THD)
    found = torch.nn.functional.scaled_dot_product_attention(
        q_THD[-1].view(2, 2, 16), k_NCD[:, forgotten:], v_NCD[:, forgotten:]
    )
    out_THD[-1] = found.reshape(4, 16)
    if not forgotten:
        compare_last_token(out_THD, q_THD, cache, pages)
        return
    with pytest.raises(PeerError, match=r"^prefill of 300 tokens is off by"):
        compare_last_token(out_THD, q_THD, cache, pages)


def fails(module: Module) -> None:
    raise RuntimeError("Ninja build failed. Ninja output:\n[1/11] nvcc ...\nerror: no space left\n")


def test_a_failed_build_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, build=fails)
    with pytest.raises(PeerError, match=r"^RuntimeError: Ninja .* output: error: no space left$"):
        FlashInfer.make(CPU)


def test_a_host_without_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(PeerError, match=r"^ModuleNotFoundError: .*flashinfer"):
        FlashInfer.make(CPU)


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
@pytest.mark.parametrize("path", ["", ".__init__", ".plan", ".run"])
@pytest.mark.parametrize("kind", ["Decode", "Prefill"])
def test_the_fake_has_the_parameters_of_the_library(kind: str, path: str) -> None:
    name = f"Batch{kind}WithPagedKVCacheWrapper"
    compare(getattr(import_module("flashinfer"), name), getattr(fake_flashinfer, name), path)


# What both processes do, with a compiler that only writes its output and who it was.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "release 13.0, V13.0" && exit
while [ $# -gt 0 ]; do
    case $1 in
        -o) out=$2 ;;
        --dependency-output | -MF) deps=$2 ;;
        -c) in=$2 ;;
    esac
    shift
done
echo "$out" > "$out"
[ -z "$deps" ] || echo "$out: $in" > "$deps"
echo "$out" >> "$COMPILED"
"""
BUILDS_AND_LOADS = """
from flashinfer.jit.core import JitSpec, jit_spec_registry
from benchmarks.flashinfer_peer import _build
_build()
JitSpec.load = lambda self, path: print("loaded", path.exists())
for spec in jit_spec_registry.get_all_specs().values():
    spec.build_and_load()
"""


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
def test_another_process_finds_every_module_built(tmp_path: Path) -> None:
    """What loads a module, in whatever process, must not compile it again."""
    compiler, compiled = tmp_path / "bin" / "nvcc", tmp_path / "compiled"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    places = {"FLASHINFER_WORKSPACE_BASE": tmp_path, "CUDA_HOME": tmp_path, "CXX": compiler}
    settings = {"FLASHINFER_CUDA_ARCH_LIST": "9.0a", "COMPILED": compiled} | places
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    commands = []
    for _ in range(2):
        command = [sys.executable, "-c", BUILDS_AND_LOADS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split("\n")[:-1] == ["loaded True"] * 3
        commands.append(len(compiled.read_text().splitlines()))
    assert commands[0] == commands[1] > 3


def compare(real: Any, fake: Any, path: str) -> None:
    """Positional parameters in the same order, the others there by name."""
    if path:
        real, fake = (getattr(thing, path.removeprefix(".")) for thing in (real, fake))
    of_real, of_fake = (inspect.signature(thing).parameters for thing in (real, fake))
    places = [name for name, at in of_fake.items() if at.kind is at.POSITIONAL_OR_KEYWORD]
    assert list(of_real)[: len(places)] == places
    assert set(of_fake) <= set(of_real)
