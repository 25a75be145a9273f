"""The table in SECURITY.md: every known class is there, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([VF]\d\d) \|(.*)\|$", re.MULTILINE)
REFERENCE = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
ROWS = {row[1]: row[2] for row in ROW.finditer(TEXT)}
UNCOVERED = "not covered yet"


def names_in(path: Path) -> set[str]:
    """Functions and classes of a test file, and names that are given to classes made elsewhere."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def test_every_class_has_one_row_in_order() -> None:
    expected = [f"V{number:02}" for number in range(1, 44)]
    expected += [f"F{number:02}" for number in range(1, 28)]
    assert [row[1] for row in ROW.finditer(TEXT)] == expected


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_tests_that_exist_or_says_that_there_is_none(row: str) -> None:
    references = REFERENCE.findall(ROWS[row])
    assert bool(references) != (UNCOVERED in ROWS[row])
    for file, name in references:
        assert (ROOT / file).is_file(), file
        assert name in names_in(ROOT / file), f"{file} has no {name}"
    cells = ROWS[row].split("|")
    assert len(cells) == 3, "class, what is done, tests"
    assert re.sub(REFERENCE, "", cells[2]).strip() == "", "every test is written in full"


def test_reports_go_to_a_private_place_and_to_no_invented_address() -> None:
    assert "Report a vulnerability" in TEXT
    assert not re.search(r"\S+@\S+\.\w+", TEXT)
