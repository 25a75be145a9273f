"""Groups of tasks, and averages over them: what counts, and how much."""

from __future__ import annotations

import pytest

from conversion.evaluation.options import GROUPS, TASKS, EvalOptions
from conversion.evaluation.report import Cell, averages, task_average
from conversion.evaluation.ruler.tasks import RULER_TASKS


def cell(task: str, right: int, setting: dict[str, str] | None = None) -> Cell:
    """Ten documents of one question, `right` of which are answered; all of them by "dense"."""
    scores = {"dense": [(1.0,)] * 10, "sparse": [(float(n < right),) for n in range(10)]}
    return Cell.of(task, 4096, setting or {}, scores)


def test_a_task_counts_once_however_many_settings_it_has() -> None:
    cells = [
        cell("code_list", 2, {"facts": "1"}),
        cell("code_list", 4, {"facts": "4"}),
        cell("code_chain", 9),
    ]
    assert task_average("code_list", 4096, cells).scores["sparse"].value == pytest.approx(0.3)
    code, retrieval = averages(cells)
    assert (code.name, code.tasks) == ("code", ("code_list", "code_chain"))
    assert code.scores["sparse"].value == pytest.approx(0.6)
    assert code.differences["sparse"].value == pytest.approx(-0.4)
    assert code.differences["sparse"].high < 0
    assert (retrieval.name, retrieval.scores) == ("retrieval", code.scores)


def test_retrieval_is_what_stands_in_the_text() -> None:
    tasks = ("cwe", "niah_single_1", "vt", "kv", "passkey", "code_frequent", "trace_counters")
    found = {line.name: line.tasks for line in averages([cell(task, 5) for task in tasks])}
    assert found["retrieval"] == ("niah_single_1", "vt", "kv", "passkey")
    assert found["ruler"] == ("cwe", "niah_single_1", "vt")


def test_rulers_columns_weigh_its_variants_together() -> None:
    """Three single and three multi-key tasks are one column each, as in the paper's tables."""
    cells = [cell(task, 10 if task.startswith("niah_single") else 3) for task in RULER_TASKS]
    found = {line.name: line for line in averages(cells)}
    assert found["ruler"].scores["sparse"].value == pytest.approx((3 + 8 * 0.3) / 11)
    columns = found["ruler, columns of the paper"]
    assert columns.tasks == ("S", "mK", "mV", "mQ", "VT", "CWE", "FWE")
    assert columns.scores["sparse"].value == pytest.approx((1 + 6 * 0.3) / 7)


def test_groups_hold_tasks_once_and_are_resolved() -> None:
    for members in GROUPS.values():
        assert set(members) <= set(TASKS)
    selected = EvalOptions(tasks=("kv", "code", "code_list", "kv")).selected()
    assert selected == ("kv", *GROUPS["code"])
