"""Everything that only a GPU can show, in order of worth, within a few minutes:

    python -m benchmarks.gpu_check FOLDER [--seconds 230] [--only engine_decode]

Each step is a process of its own with a limit; one that fails or hangs does not stop the next. A
benchmark that fails is run again with CUDA_LAUNCH_BLOCKING=1, which names the launch at fault.
FOLDER receives `gpu-check.json` (written anew after every step: what ran, how long, exit status,
the JSON line that it printed) and `gpu-check.log` (all output). Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LEAST_SECONDS = 8.0  # a step that has less than this is left out
SHOWN_LINES = 12


@dataclass(frozen=True, slots=True)
class Step:
    """A command of this interpreter, what it may take, and whether to find out why it failed."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    explain: bool = False


def tests(name: str, seconds: float, *selection: str) -> Step:
    return Step(name, ("-m", "pytest", "-p", "no:cacheprovider", "-rs", *selection), seconds)


DECODE = ("-m", "benchmarks.engine_decode")
PREFILL = ("-m", "benchmarks.engine_prefill", "--repeats=1")
DECODE_TESTS = "a_layer or production or repeats or graph"
DECODE_ONLY = ("--only=decode", "--json")
STEPS = (
    tests("layer_tests", 90, "tests/gpu/test_trials.py", "tests/gpu/test_layer_kernels.py"),
    tests("engine_tests", 110, "tests/gpu/test_engine_prefill.py", "tests/gpu/test_engine_cuda.py"),
    tests("decode_kernel_tests", 45, "tests/gpu/test_cuda_decode.py", "-k", DECODE_TESTS),
    Step("engine_decode", DECODE, 60, explain=True),
    Step("engine_decode_bounded", (*DECODE, "--kv-cache-gib=4"), 45, explain=True),
    Step("engine_prefill", (*PREFILL, "--variants=sparse,dense,flash,cudnn"), 75, explain=True),
    Step(
        "engine_prefill_embedded",
        (*PREFILL, "--model=engine/embedded_model", "--context=32000", "--variants=sparse,ops"),
        40,
        explain=True,
    ),
    Step(
        "attention_decode", ("-m", "server.cli", "bench", "attention", "--quick", *DECODE_ONLY), 75
    ),
    tests("op_tests", 60, "tests/gpu/test_cuda.py"),
    tests("kernel_tests", 300, "tests/gpu/test_cuda_decode.py", "tests/gpu/test_prefill_sparse.py"),
)


def last_json(text: str) -> Any:
    """The object of the last line that is one; None without such a line."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def run(step: Step, seconds: float, log: Path, extra: dict[str, str]) -> dict[str, Any]:
    """Run a step to its end or its limit; what there is to say of it."""
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *step.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **extra},
        start_new_session=True,  # so that what it started ends with it
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nstopped after {seconds:.0f} s\n"
    with log.open("a") as file:
        file.write(f"==== {step.name}: {' '.join(step.arguments)}\n{output}\n")
    lines = [line for line in output.splitlines() if line.strip()]
    return {
        "name": step.name,
        "command": " ".join(("python", *step.arguments)),
        "status": process.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "result": last_json(output),
        "last_lines": [line[:200] for line in lines[-SHOWN_LINES:]],
    }


def check(steps: Sequence[Step], folder: Path, seconds: float, commit: str) -> dict[str, Any]:
    """Run all steps for which there is time; the report, which lies in the folder too."""
    folder.mkdir(parents=True, exist_ok=True)
    log, target = folder / "gpu-check.log", folder / "gpu-check.json"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"date": date, "commit": commit, "steps": [], "left_out": []}
    end = time.monotonic() + seconds
    for step in steps:
        for extra in ({}, {"CUDA_LAUNCH_BLOCKING": "1"}):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                report["left_out"].append(step.name)
                break
            found = run(step, min(step.seconds, left), log, extra)
            report["steps"].append(found | ({"environment": extra} if extra else {}))
            print(f"{step.name}: status {found['status']}, {found['seconds']} s", flush=True)
            target.write_text(json.dumps(report) + "\n")
            if found["status"] == 0 or not step.explain:
                break
    target.write_text(json.dumps(report) + "\n")
    return report


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=230.0, help="for all steps together")
    parser.add_argument("--only", default="", help="names of steps, comma-separated")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name]
    if unknown := set(names) - {step.name for step in STEPS}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    steps = [step for step in STEPS if not names or step.name in names]
    report = check(steps, given.folder, given.seconds, _commit())
    if report["left_out"]:
        print(f"no time for: {', '.join(report['left_out'])}")
    return int(any(step["status"] != 0 for step in report["steps"]))


if __name__ == "__main__":
    sys.exit(main())
