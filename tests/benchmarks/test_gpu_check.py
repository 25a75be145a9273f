"""The check of a GPU host goes on after failures, keeps to its time, and reports every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import STEPS, Step, check

PRINTS = Step("prints", ("-c", "print('noise'); print('{\"a\": 1}'); print('more')"), 30)
BLOCKING = (
    "import os; print('blocking', os.environ.get('CUDA_LAUNCH_BLOCKING')); raise SystemExit(3)"
)
FAILS = Step("fails", ("-c", BLOCKING), 30, explain=True)
HANGS = Step("hangs", ("-c", "import time; print('here'); time.sleep(600)"), 0.5)


def test_every_step_is_reported_whatever_became_of_the_others(tmp_path: Path) -> None:
    report = check([FAILS, HANGS, PRINTS], tmp_path, 60, "abc")
    names = [(step["name"], step["status"]) for step in report["steps"]]
    assert names == [("fails", 3), ("fails", 3), ("hangs", -9), ("prints", 0)]
    first, explained, _, printed = report["steps"]
    assert "environment" not in first
    assert explained["environment"] == {"CUDA_LAUNCH_BLOCKING": "1"}
    assert first["last_lines"] == ["blocking None"]
    assert explained["last_lines"] == ["blocking 1"]
    assert "blocking 1\n" in (tmp_path / "gpu-check.log").read_text()
    assert printed["result"] == {"a": 1}
    assert printed["last_lines"][-1] == "more"
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == report


def test_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1e9)
    report = check([PRINTS], tmp_path, 60, "abc")
    assert report["steps"] == []
    assert report["left_out"] == ["prints"]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_steps_name_files_that_exist(step: Step) -> None:
    root = Path(__file__).parents[2]
    for argument in step.arguments:
        if argument.endswith(".py"):
            assert (root / argument).is_file()
        if argument.startswith("benchmarks."):
            assert (root / argument.replace(".", "/")).with_suffix(".py").is_file()
