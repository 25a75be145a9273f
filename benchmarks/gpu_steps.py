"""The steps of `benchmarks.gpu_check`: what each runs, how long it may take, how one is run."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.bounded_process import run_bounded

SHOWN_LINES = 12
FOUND = 86  # exit status where a checker found something; pytest has none above 5
# memcheck looks at the project's kernels, by their namespace: others would take most of the time.
# racecheck (of CUDA 13.0) dies of any such choice. It must be told how many mbarriers a CTA has:
# what it counts by itself leaves some out, and what these order looks like a race.
BARRIERS = 64
CHECKERS = {
    "memcheck": ("--kernel-name", "kns=rtpurbo", "--error-exitcode", str(FOUND)),
    "racecheck": ("--num-cuda-barriers", str(BARRIERS), "--error-exitcode", str(FOUND)),
}
REPORTED = re.compile(r"^=========.* at (?:void )?(\S.*?)\+0x[0-9a-f]+", re.MULTILINE)
LOGGED_BYTES = 2**20  # of a step, its end
PEER_SECONDS = 45  # of an attention step's limit, for a peer that is built already


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a step is run: beyond its own arguments and this environment."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


EXPLAIN = Attempt(environment={"CUDA_LAUNCH_BLOCKING": "1"})  # names the launch at fault
WITHOUT_PEER = Attempt(arguments=("--no-peer",))  # a library's fault must not cost our figures


@dataclass(frozen=True, slots=True)
class Step:
    """A command of this interpreter.

    seconds: what it may take. file: where its figures go, "" for what has none; "{file}" among the
    arguments is its path, for a command that writes it itself. rows: the list among the figures
    that grows as it measures. again: what is tried after a failure, or at once if BUILD failed.
    needs_build: uses what BUILD makes. beside: others run meanwhile, so it gives way. checker: tool
    of NVIDIA's compute-sanitizer that it runs under. environment: beyond that of this process.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    file: str = ""
    rows: str = ""
    again: tuple[Attempt, ...] = ()
    needs_build: bool = False
    beside: bool = False
    checker: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, attempt: Attempt, folder: Path) -> list[str]:
        """Of this interpreter, with the file's path in place."""
        path = str(folder / self.file)
        parts = [part.replace("{file}", path) for part in (*self.arguments, *attempt.arguments)]
        nice = ("nice", "-n", "10") if self.beside else ()
        return [*nice, *self._under(), sys.executable, *parts]

    def _under(self) -> tuple[str, ...]:
        """The checker, in front of the interpreter."""
        if not self.checker:
            return ()
        return (sanitizer(), "--tool", self.checker, *CHECKERS[self.checker])


def sanitizer() -> str:
    """compute-sanitizer of this host: on the path, or of the toolkit where that is not."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(f"{home}/bin/{name}") or name


def _tests(name: str, seconds: float, *selection: str) -> Step:
    return Step(name, ("-m", "pytest", "-p", "no:cacheprovider", "-rs", *selection), seconds)


def _checked(checker: str, seconds: float) -> Step:
    races = ("-m", "benchmarks.kernel_races")
    return Step(checker, races, seconds, checker=checker, environment=UNCACHED)


def _attention(part: str, seconds: float, *more: str) -> Step:
    bench = ("-m", "server.cli", "bench", "attention", f"--only={part}", "--out={file}")
    return Step(
        f"attention_{part}",
        (*bench, f"--peer-seconds={PEER_SECONDS}", *more),
        seconds,
        f"attention-{part}.json",
        rows=part,
        again=(WITHOUT_PEER,),
        needs_build=True,
    )


def _figures(name: str, seconds: float, module: str, *more: str) -> Step:
    file = f"{name.replace('_', '-')}.json"
    return Step(name, ("-m", f"benchmarks.{module}", *more), seconds, file, again=(EXPLAIN,))


KERNEL_TESTS = tuple(
    f"tests/gpu/test_{name}.py"
    for name in ("cuda_decode", "cuda_one_row", "layer_kernels", "prefill", "prefill_sparse")
)
# Every kernel on ugly shapes; a checker makes a test some tens of times slower.
CHECKED = (
    "test_a_layer or test_int8_index_keys or test_store_options or test_ends_of_a_step"
    " or test_experts or (test_spans and cuda) or test_attention_to_lists"
)
# An allocation of its own for every tensor: what lies behind one in PyTorch's pool is no error.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TRIALS = ("tests/gpu/test_trials.py", "tests/gpu/test_layer_kernels.py")
# The lengths with a target first; 1M takes two thirds of the time.
LENGTHS = "--lengths=32768,131072,1048576,65536,262144,524288"
PREFILL = ("engine_prefill", "--repeats=1")
EMBEDDED = ("--model=engine/embedded_model", "--context=32000", "--variants=sparse,ops")
# 16 cores took 137 s for it beside the tests. What is timed waits no longer than this.
BUILD = Step("flashinfer_build", ("-m", "benchmarks.flashinfer_peer"), 240, beside=True)
STEPS = (
    _tests("trials", 90, *TRIALS),
    _tests("gpu_tests", 300, "tests/gpu", *(f"--ignore={path}" for path in TRIALS)),
    _attention("decode", 180),
    _attention("prefill", 240, LENGTHS),
    _figures("engine_decode", 110, "engine_decode"),
    _figures("engine_prefill", 90, *PREFILL, "--variants=sparse,dense,flash,cudnn"),
    _figures("decode_anatomy", 180, "decode_anatomy", "{file}"),
    _figures("engine_prefill_embedded", 45, *PREFILL, *EMBEDDED),
    _checked("memcheck", 150),
    _checked("racecheck", 300),
)
# By name only. The tests launch the kernels on more shapes, and PyTorch's own beside them: 113 s.
MEMCHECK_TESTS = replace(
    _tests("memcheck_tests", 240, *KERNEL_TESTS, "-k", CHECKED),
    checker="memcheck",
    environment=UNCACHED,
)
BY_NAME = {step.name: step for step in (*STEPS, MEMCHECK_TESTS)}


def run_step(step: Step, attempt: Attempt, seconds: float, folder: Path) -> dict[str, Any]:
    """Run a step to its end or its limit; what there is to say of it."""
    environment = {"PYTHONUNBUFFERED": "1", **step.environment, **attempt.environment}
    ended = run_bounded(step.command(attempt, folder), seconds, environment)
    under = ("compute-sanitizer", "--tool", step.checker) if step.checker else ()
    shown = " ".join([*under, "python", *step.arguments, *attempt.arguments])
    shown = shown.replace("{file}", step.file)
    lines = ended.lines
    log = ended.output[-LOGGED_BYTES:]
    if ended.stopped:
        lines.append(f"stopped after {seconds:.0f} s")
        log += f"\n{lines[-1]}\n"
    with (folder / "gpu-check.log").open("a") as file:
        file.write(f"==== {step.name}: {shown}\n{log}\n")
    return {
        "name": step.name,
        "command": shown,
        "status": ended.status,
        "stopped": ended.stopped,
        "seconds": round(ended.seconds, 1),
        "result": ended.last_json,
        "last_lines": [line[:200] for line in lines[-SHOWN_LINES:]],
        **({"reported": reported(ended.output)} if step.checker else {}),
        **({"environment": attempt.environment} if attempt.environment else {}),
    }


def reported(output: str) -> list[str]:
    """Kernels that a checker names, without what they are templates of and what they take."""
    plain = (name.replace("(anonymous namespace)::", "") for name in REPORTED.findall(output))
    return sorted({re.split(r"[<(]", name)[0] for name in plain})
