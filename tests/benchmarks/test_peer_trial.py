"""FlashInfer gets its time, in a process of its own; the others are measured whatever it does."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import attention
from benchmarks.attention import AttentionBench, BenchError, find_peer, measure
from benchmarks.flashinfer_peer import FlashInfer
from benchmarks.gpu_steps import PEER_SECONDS, STEPS
from benchmarks.peer_check import PeerError
from benchmarks.peer_trial import COMMAND, try_peer
from server.commands.bench import bench_attention
from tests.benchmarks import fake_flashinfer

HANGS = "import time; print('[1/33] nvcc', flush=True); time.sleep(600)"
FAILS = "import sys; print('[1/33] nvcc'); sys.exit('flashinfer: RuntimeError: no space left')"
ABSENT = 'print(\'{"benchmark": "flashinfer_build", "not_measured": "not here"}\')'
READY = 'print(\'{"benchmark": "flashinfer_build", "version": "0.6.8"}\')'


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "seconds", "why"),
    [
        (HANGS, 0.5, r"^not ready within 0\.5 s; `python -m benchmarks\.flashinfer_peer` makes"),
        (FAILS, 60, r"^RuntimeError: no space left \(status 1\)$"),
        ("import os; os.abort()", 60, r"^no output \(status -6\)$"),
        (ABSENT, 60, r"^not here$"),
    ],
    ids=["hangs", "fails", "aborts", "absent"],
)
def test_a_peer_that_is_not_ready_says_why(code: str, seconds: float, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        try_peer(seconds, python(code))


def test_a_peer_that_is_ready_says_what_it_took() -> None:
    assert 0 < try_peer(60, python(READY)) < 60


def test_the_trial_is_the_command_that_builds_ahead() -> None:
    """On a host without a GPU, or without FlashInfer, it ends with a line all the same."""
    with pytest.raises(PeerError):
        try_peer(300, COMMAND)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_flashinfer.modules(lambda module: None).items():
        monkeypatch.setitem(sys.modules, name, module)


def told(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """The trial runs this instead."""
    monkeypatch.setattr(attention, "try_peer", lambda seconds: try_peer(seconds, python(code)))


@pytest.mark.usefixtures("installed")
def test_a_peer_is_made_here_only_after_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, HANGS)
    monkeypatch.setattr(FlashInfer, "make", lambda: pytest.fail("it was not ready"))
    bench, console = AttentionBench(peer_seconds=0.2), Console(quiet=True)
    peer, about = find_peer(bench, console)
    assert peer is None
    assert about["not_measured"].startswith("not ready within 0.2 s")
    told(monkeypatch, READY)
    made = FlashInfer(sys.modules["flashinfer"], torch.device("cpu"), 1.0)
    monkeypatch.setattr(FlashInfer, "make", lambda: made)
    peer, about = find_peer(AttentionBench(), console)
    assert peer is made
    assert set(about) == {"version", "build_seconds", "trial_seconds"}


def test_no_process_tries_what_is_not_installed_or_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "try_peer", lambda seconds: pytest.fail("nothing to try"))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    found = [find_peer(AttentionBench(peer=peer), Console(quiet=True)) for peer in (True, False)]
    reasons = [about["not_measured"] for _, about in found]
    assert reasons == ["it is not installed", "not asked for"]


@pytest.fixture
def measurable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU host in name, where nothing has to be measured but the records."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr(attention, "find_library", lambda folder: None)
    monkeypatch.setattr(attention, "KernelLibrary", lambda path: None)
    monkeypatch.setattr(attention, "copy_bandwidths", lambda: {"copy": 1e12})
    monkeypatch.setattr(attention, "product_flops", lambda: 1e15)
    monkeypatch.setattr(attention, "describe_hardware", dict)
    monkeypatch.setattr(attention, "judge", lambda result: [])
    monkeypatch.setattr(attention, "_show", lambda *args: None)


@pytest.mark.usefixtures("installed", "measurable")
def test_a_peer_that_hangs_costs_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run on a GPU host once measured nothing, since it waited for FlashInfer's compiler."""
    told(monkeypatch, HANGS)
    out, seen = tmp_path / "out.json", list[dict[str, Any]]()

    def records(*args: Any) -> Iterator[dict[str, Any]]:
        assert args[-1] is None  # the peer
        for context in (64, 128):
            seen.append(json.loads(out.read_text()))
            yield {"rows": 1, "context": context, "share": 0.03, "seconds": 0.0}

    monkeypatch.setattr("benchmarks.attention_decode.records", records)
    measure(AttentionBench(prefill=False, peer_seconds=0.2, out=out))
    written = json.loads(out.read_text())
    assert written["peers"]["flashinfer"]["not_measured"].startswith("not ready within 0.2 s")
    assert [len(result["decode"]) for result in (*seen, written)] == [0, 1, 2]
    assert [result["complete"] for result in (*seen, written)] == [False, False, True]


@pytest.mark.usefixtures("measurable")
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_the_time_of_a_peer_is_one_that_passes(seconds: float) -> None:
    with pytest.raises(BenchError, match=r"^peer_seconds must be more than 0"):
        measure(AttentionBench(peer_seconds=seconds))


def test_the_command_line_and_the_bench_wait_equally_long() -> None:
    flag = inspect.signature(bench_attention).parameters["peer_seconds"]
    assert flag.default == AttentionBench().peer_seconds


def test_the_peer_takes_little_of_a_step_on_a_gpu_host() -> None:
    waiting = [step for step in STEPS if step.needs_build]
    assert len(waiting) == 2
    for step in waiting:
        assert f"--peer-seconds={PEER_SECONDS}" in step.arguments
        assert step.seconds >= 3 * PEER_SECONDS
