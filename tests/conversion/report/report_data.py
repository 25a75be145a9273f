"""Evaluations and ablations of made-up scores, and a page taken apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conversion.evaluation.intervals import Interval, ScoresByDocument
from conversion.evaluation.report import Cell, EvalReport, averages, task_averages
from conversion.evaluation.text_agreement import Agreement, LossCurve
from engine.errors import EngineError

RIGHT: ScoresByDocument = ((1.0, 1.0), (1.0, 0.0))
WRONG: ScoresByDocument = ((1.0, 0.0), (0.0, 0.0))


def evaluation(
    *,
    model: str = "out",
    variants: tuple[str, ...] = ("dense", "sparse"),
    tasks: Sequence[str] = ("code_constant", "code_list"),
    lengths: Sequence[int] = (256, 512),
    text: bool = True,
    grid: bool = False,
) -> EvalReport:
    """The first variant is right three times of four, the others once."""
    cells = [
        Cell.of(task, length, {"facts": facts}, _scores(variants), _attended(variants, length))
        for length in lengths
        for task in tasks
        for facts in ("1", "4")
    ]
    if grid:
        cells += [
            Cell.of("passkey", length, {"depth": depth}, _scores(variants))
            for length in lengths
            for depth in ("0.0", "1.0")
        ]
    return EvalReport(
        model=model,
        variants=variants,
        settings={"samples": 2, "seed": 3},
        notes=("text: made up",),
        cells=tuple(cells),
        agreements=tuple(_agreement(variants[-1], length) for length in lengths) if text else (),
        curves=tuple(_curve(name, n) for n in lengths for name in variants) if text else (),
        averages=averages(cells),
        by_task=task_averages(cells),
    )


def ablations(reports: Mapping[str, EvalReport]) -> dict[str, Any]:
    """The content of a file of `rtpurbo ablate`."""
    variants = {
        name: {"description": f"{name} instead", "report": report.as_dict()}
        for name, report in reports.items()
    }
    return {"variants": variants, "skipped": {"index_dim 32": "too large"}}


def written(path: Path, value: Any) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def silent(line: str) -> None:
    """Where nothing may be told."""
    raise AssertionError(f"nothing was to be told, but: {line}")


def report_of(out: Path) -> dict[str, Any]:
    """report.json of a converted folder."""
    found: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    return found


def refusal(work: Callable[[], object]) -> str:
    """The one line that is told."""
    with pytest.raises(EngineError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


class Page:
    """A page that is well-formed, or the parser refuses it."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text(encoding="utf-8")
        self._root = ElementTree.fromstring(self.source.removeprefix("<!DOCTYPE html>"))

    def section(self, name: str) -> ElementTree.Element:
        """By the id of its anchor."""
        (found,) = (own for own in self._root.iter("section") if own.get("id") == name)
        return found

    def text(self, name: str) -> str:
        return " ".join("".join(self.section(name).itertext()).split())

    def hints(self, name: str) -> list[str]:
        """What a section says is missing."""
        return [
            "".join(own.itertext())
            for own in self.section(name).iter("p")
            if own.get("class") == "missing"
        ]

    def images(self, name: str) -> int:
        return sum(1 for _ in self.section(name).iter("img"))

    def cells(self, name: str) -> list[list[str]]:
        """Rows of all tables of a section."""
        rows = (row.findall("td") for row in self.section(name).iter("tr"))
        return [["".join(cell.itertext()) for cell in row] for row in rows if row]

    def attributes(self) -> list[tuple[str, str, str]]:
        """Of every element: tag, name, value."""
        return [(own.tag, *pair) for own in self._root.iter() for pair in own.attrib.items()]

    def tags(self) -> set[str]:
        return {own.tag for own in self._root.iter()}

    def contents(self) -> list[str]:
        """Where the table of contents leads to."""
        return [str(own.get("href")) for own in self._root.iter("a")]


def _scores(variants: Sequence[str]) -> dict[str, ScoresByDocument]:
    return {name: WRONG if number else RIGHT for number, name in enumerate(variants)}


def _attended(variants: Sequence[str], length: int) -> dict[str, float]:
    return dict.fromkeys(variants[1:], 64 / length)


def _agreement(variant: str, length: int) -> Agreement:
    return Agreement(
        variant=variant,
        length=length,
        prompt="served",
        tokens=50,
        kl_mean=0.0123,
        kl_median=0.004,
        kl_p99=0.2,
        top1=Interval(0.96, 0.9, 0.99),
    )


def _curve(variant: str, length: int) -> LossCurve:
    loss = 2.0 if variant == "dense" else 2.5
    return LossCurve(
        variant=variant,
        length=length,
        decoded_from=length // 2,
        edges=(0, length // 2, length - 1),
        losses=(3.0, loss),
        mean=(3.0 + loss) / 2,
        decoded_mean=loss,
    )
