"""Files of evaluations and ablations: read back as they were, or refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from conversion.report.evaluation_file import read_ablations, read_evaluation
from tests.conversion.report.report_data import ablations, evaluation, refusal, written


def test_an_evaluation_is_read_back_as_it_was(tmp_path: Path) -> None:
    value = evaluation(grid=True).as_dict()
    found = read_evaluation(written(tmp_path / "eval.json", value)).as_dict()
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(value))


def test_ablations_are_read_back_in_their_order(tmp_path: Path) -> None:
    value = ablations({"sparse": evaluation(), "a": evaluation(text=False)})
    found = read_ablations(written(tmp_path / "ablations.json", value))
    assert json.loads(json.dumps(found.as_dict())) == json.loads(json.dumps(value))
    assert [own.name for own in found.variants] == ["sparse", "a"]
    del value["skipped"]
    assert read_ablations(written(tmp_path / "ablations.json", value)).skipped == {}


def test_a_file_without_task_averages_gets_them_with_intervals_that_are_not_too_narrow(
    tmp_path: Path,
) -> None:
    report = evaluation()
    value = report.as_dict()
    del value["by_task"]
    found = read_evaluation(written(tmp_path / "eval.json", value)).by_task
    assert [(line.name, line.length) for line in found] == [
        (line.name, line.length) for line in report.by_task
    ]
    for ours, exact in zip(found, report.by_task, strict=True):
        for name, score in exact.scores.items():
            assert ours.scores[name].value == pytest.approx(score.value)
            assert ours.scores[name].low <= score.low + 1e-9
            assert ours.scores[name].high >= score.high - 1e-9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "rtpurbo eval --json"),
        (b"{}", "rtpurbo eval --json"),
        (b'{"format_version": 99}', "format_version must be 1, got 99"),
        (b'{"format_version": 1}', "model: Field required"),
    ],
    ids=["empty", "cut", "bytes", "deep", "list", "other", "later", "bare"],
)
def test_what_is_no_evaluation_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_bytes(content)
    told = refusal(lambda: read_evaluation(path))
    assert message in told
    assert str(path) in told


def broken(place: str, value: object) -> dict[str, Any]:
    """An evaluation with one thing changed, such as "cells.0.length"."""
    found: dict[str, Any] = copy.deepcopy(json.loads(json.dumps(evaluation(grid=True).as_dict())))
    *steps, last = (int(step) if step.isdigit() else step for step in place.split("."))
    part: Any = found
    for step in steps:
        part = part[step]
    part[last] = value
    return found


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("cells", 5, "cells"),
        ("cells.0", 5, "cells"),
        ("cells.0.length", "long", "cells.0.length"),
        ("cells.0.length", 0, "cells.0: length"),
        ("cells.0.scores", {}, "cells.0: must have scores of dense, sparse"),
        ("cells.0.scores.dense.value", 7.0, "cells.0: scores must be from 0 to 1"),
        ("cells.0.scores.dense.value", float("nan"), "cells.0: scores must be from 0 to 1"),
        ("cells.0.differences.sparse.low", -3.0, "cells.0: differences"),
        ("cells.0.attended.sparse", 1.5, "cells.0: attended"),
        ("cells.8.setting", {}, "cells.8: depth"),
        ("cells.8.setting", {"depth": "deep"}, "cells.8: depth"),
        ("averages.0.scores", {}, "averages.0: must have scores"),
        ("agreements.0.kl_mean", float("inf"), "agreements.0"),
        ("agreements.0.variant", "other", "agreements.0"),
        ("curves.0.edges", [0, 1], "curves.0: edges"),
        ("curves.0.edges", [0, 9, 5], "curves.0: edges"),
        ("curves.0.losses", [1.0, float("nan")], "curves.0: losses"),
        ("curves.0.variant", "other", "curves.0"),
        ("variants", [], "variants"),
        ("variants", ["dense", "dense"], "variants"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_that_no_evaluation_prints_are_named(
    place: str, value: object, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "eval.json", broken(place, value))
    assert message in refusal(lambda: read_evaluation(path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no object `variants`"),
        ({"variants": []}, "no object `variants`"),
        ({"variants": {"a": {"report": {}}}}, "'a' has no description"),
        ({"variants": {"a": {"description": "b"}}}, "'a': not an evaluation"),
        ({"variants": {}, "skipped": [1]}, "the whole"),
    ],
    ids=["list", "no-object", "no-description", "no-report", "skipped"],
)
def test_what_is_no_file_of_ablations_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "ablations.json", value)
    assert message in refusal(lambda: read_ablations(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere.json" in refusal(lambda: read_evaluation(tmp_path / "nowhere.json"))
    assert str(tmp_path) in refusal(lambda: read_ablations(tmp_path))
