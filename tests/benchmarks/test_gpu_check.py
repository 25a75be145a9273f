"""The check of a GPU host goes on after failures, keeps to its time, and reports every step."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Check
from benchmarks.gpu_steps import (
    BUILD,
    BY_NAME,
    EXPLAIN,
    FOUND,
    LOGGED_BYTES,
    STEPS,
    WITHOUT_PEER,
    Step,
)

PRINTS = Step("prints", ("-c", "print('noise'); print('{\"a\": 1}'); print('more')"), 30)
BLOCKING = (
    "import os; print('blocking', os.environ.get('CUDA_LAUNCH_BLOCKING')); raise SystemExit(3)"
)
FAILS = Step("fails", ("-c", BLOCKING), 30, again=(EXPLAIN,))
HANGS = Step("hangs", ("-c", "import time; print('here'); time.sleep(600)"), 0.5, again=(EXPLAIN,))
BUILT = Step("built", ("-c", "print('compiling')"), 30, beside=True)
WRITES = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(json.dumps({"rows": sys.argv[2:], "hardware": {"gpu": "H"}}))
sys.exit(len(sys.argv) == 2)
"""
LEAVES = Step(
    "leaves",
    ("-c", WRITES, "{file}"),
    30,
    "leaves.json",
    rows="rows",
    again=(WITHOUT_PEER,),
    needs_build=True,
)


def test_every_step_is_reported_whatever_became_of_the_others(tmp_path: Path) -> None:
    report = Check(tmp_path, "abc", 60).run([FAILS, HANGS, PRINTS])
    names = [(step["name"], step["status"], step["stopped"]) for step in report["steps"]]
    failed = ("fails", 3, False)
    assert names == [failed, failed, ("hangs", -9, True), ("prints", 0, False)]
    first, explained, _, printed = report["steps"]
    assert "environment" not in first
    assert explained["environment"] == {"CUDA_LAUNCH_BLOCKING": "1"}
    assert first["last_lines"] == ["blocking None"]
    assert explained["last_lines"] == ["blocking 1"]
    assert "blocking 1\n" in (tmp_path / "gpu-check.log").read_text()
    assert printed["result"] == {"a": 1}
    assert printed["last_lines"][-1] == "more"
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == report


def test_a_checker_of_the_toolkit_runs_what_it_is_given_and_its_finds_are_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without the tool; PyTorch's pool is off, which hides what lies behind a tensor."""
    show = "import os; print(os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING'))"
    step = BY_NAME["memcheck"]
    checked = dataclasses.replace(step, arguments=("-c", show))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    missing = Check(tmp_path, "abc", 60).run([checked, PRINTS])["steps"]
    assert [found["status"] for found in missing] == [127, 0]
    assert missing[0]["last_lines"] == ["compute-sanitizer: not found"]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$1 $2 $3 $4 $5 $6"; shift 6; "$@"; echo "$FOUND"; exit 86\n')
    tool.chmod(0o755)
    line = (
        "========= Invalid __global__ read at void rtpurbo::a_kernel<(int)8>(Args)+0x90 in a.cu:3"
    )
    monkeypatch.setenv("FOUND", line)
    (found,) = Check(tmp_path, "abc", 60).run([checked])["steps"]
    assert found["status"] == FOUND
    assert found["last_lines"] == [
        f"--tool memcheck --kernel-name kns=rtpurbo --error-exitcode {FOUND}",
        "1",
        line,
    ]
    assert found["reported"] == ["rtpurbo::a_kernel"]
    assert found["command"].startswith("compute-sanitizer --tool memcheck python -c ")


def test_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1e9)
    report = Check(tmp_path, "abc", 60, BUILT).run([PRINTS, LEAVES])
    assert [step["name"] for step in report["steps"]] == ["built"]
    assert report["left_out"] == ["prints", "leaves"]
    assert report["missing"] == ["leaves.json (no time)"]


def test_figures_lie_in_files_with_where_they_are_from(tmp_path: Path) -> None:
    """From standard output or, where a command writes it itself, from its file, tried again."""
    (tmp_path / "leaves.json").write_text("of an earlier run")
    prints = dataclasses.replace(PRINTS, file="prints.json")
    report = Check(tmp_path, "abc", 60, BUILT).run([prints, LEAVES])
    printed, left = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("prints", "leaves"))
    assert printed["figures"] == {"a": 1}
    assert printed["commit"] == left["commit"] == "abc"
    assert left["figures"]["rows"] == ["--no-peer"]
    assert left["command"].endswith("leaves.json --no-peer")
    assert left["earlier_attempt"]["figures"]["rows"] == []
    assert left["earlier_attempt"]["status"] == 1
    assert report["hardware"] == {"gpu": "H"}
    names = [(step["name"], step["status"]) for step in report["steps"]]
    assert names == [("built", 0), ("prints", 0), ("leaves", 1), ("leaves", 0)]
    assert report["missing"] == []
    assert str(tmp_path) not in json.dumps(report)


def test_a_part_of_a_file_is_kept_and_named(tmp_path: Path) -> None:
    once = dataclasses.replace(LEAVES, again=())
    absent = dataclasses.replace(FAILS, file="fails.json", again=())
    report = Check(tmp_path, "abc", 60, BUILT).run([once, absent])
    assert json.loads((tmp_path / "leaves.json").read_text())["figures"]["rows"] == []
    missing = ["leaves.json (in part, 0 rows, status 1)", "fails.json (status 3)"]
    assert report["missing"] == missing


# Leaves as many rows as its first argument says, and then hangs; without the peer it ends, with 9.
CUT = """
import json, pathlib, sys, time
alone = "--no-peer" in sys.argv
rows = [0] * (9 if alone else int(sys.argv[1]))
if sys.argv[1] != "-1" or alone:
    pathlib.Path(sys.argv[2]).write_text(json.dumps({"rows": rows}))
    print("written", flush=True)
time.sleep(0 if alone else 600)
"""


def cut(rows: int, seconds: float) -> Step:
    arguments = ("-c", CUT, str(rows), "{file}")
    return dataclasses.replace(LEAVES, arguments=arguments, seconds=seconds)


def test_rows_of_a_step_that_is_cut_are_kept_and_counted(tmp_path: Path) -> None:
    report = Check(tmp_path, "abc", 60, BUILT).run([cut(7, 5)])
    (_, found) = report["steps"]
    assert (found["status"], found["stopped"], found["rows"]) == (-9, True, 7)
    kept = json.loads((tmp_path / "leaves.json").read_text())
    assert kept["rows"] == len(kept["figures"]["rows"]) == 7
    missing = f"leaves.json (in part, 7 rows, stopped after {found['seconds']} s)"
    assert report["missing"] == [missing]


@pytest.mark.parametrize("rows", [-1, 0], ids=["no file", "no row"])
def test_a_step_that_waited_in_vain_is_run_without_the_peer(tmp_path: Path, rows: int) -> None:
    report = Check(tmp_path, "abc", 60, BUILT).run([cut(rows, 2)])
    _, waited, alone = report["steps"]
    assert waited["stopped"]
    assert alone["command"].endswith("--no-peer")
    assert (alone["status"], alone["rows"]) == (0, 9)
    assert len(json.loads((tmp_path / "leaves.json").read_text())["figures"]["rows"]) == 9
    assert report["missing"] == []


def test_what_is_timed_waits_for_the_compiler_and_tests_do_not(tmp_path: Path) -> None:
    ends = tmp_path / "tests-ran"
    wait = (
        "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"
    )
    builds = dataclasses.replace(BUILT, arguments=("-c", wait, str(ends)))
    tests = Step("tests", ("-c", f"import pathlib; pathlib.Path({str(ends)!r}).touch()"), 30)
    timed = dataclasses.replace(PRINTS, file="prints.json")
    report = Check(tmp_path, "abc", 60, builds).run([tests, timed, LEAVES])
    names = [step["name"] for step in report["steps"]]
    assert names == ["tests", "built", "prints", "leaves", "leaves"]


def test_figures_outlast_a_second_attempt_that_has_none(tmp_path: Path) -> None:
    only_first = "import sys; sys.exit(9) if len(sys.argv) > 2 else None\n" + WRITES
    step = dataclasses.replace(LEAVES, arguments=("-c", only_first, "{file}"))
    report = Check(tmp_path, "abc", 60, BUILT).run([step])
    assert [found["status"] for found in report["steps"]] == [0, 1, 9]
    assert json.loads((tmp_path / "leaves.json").read_text())["status"] == 1
    assert report["missing"] == ["leaves.json (in part, 0 rows, status 9)"]


def test_a_failed_build_is_not_tried_again_by_those_that_need_it(tmp_path: Path) -> None:
    report = Check(tmp_path, "abc", 60, FAILS).run([LEAVES])
    names = [(step["name"], step["status"]) for step in report["steps"]]
    assert names == [("fails", 3), ("leaves", 0)]
    assert report["steps"][1]["command"].endswith("--no-peer")


def test_the_log_stays_small(tmp_path: Path) -> None:
    chatty = Step("chatty", ("-c", f"print('x' * {3 * LOGGED_BYTES})"), 30)
    Check(tmp_path, "abc", 60).run([chatty])
    assert (tmp_path / "gpu-check.log").stat().st_size < LOGGED_BYTES + 200


def test_the_folder_comes_back_whole() -> None:
    """At most eight files come back from a device host."""
    files = {step.file for step in STEPS if step.file} | {"gpu-check.json", "gpu-check.log"}
    assert len(files) <= 8


@pytest.mark.parametrize("step", [*BY_NAME.values(), BUILD], ids=lambda step: step.name)
def test_steps_name_files_that_exist(step: Step) -> None:
    root = Path(__file__).parents[2]
    for argument in step.arguments:
        path = argument.removeprefix("--ignore=")
        if path.startswith("tests/"):
            assert os.path.exists(root / path)
        if argument.startswith("benchmarks."):
            assert (root / argument.replace(".", "/")).with_suffix(".py").is_file()
