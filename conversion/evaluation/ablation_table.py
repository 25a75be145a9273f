"""Ablations on the terminal: what each variant costs and what it loses, by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from conversion.evaluation.intervals import Interval
from conversion.evaluation.tables import points_text, share_text

Found = Mapping[str, Any]  # JSON
SHOWN_AVERAGES = ("retrieval", "ruler", "code", "trace")  # the first that there is


def print_ablations(content: Found, console: Console) -> None:
    """The content of OUT.json (`conversion.evaluation.ablations`)."""
    reports = {name: own["report"] for name, own in content["variants"].items()}
    console.print(_table(reports))
    for name, own in content["variants"].items():
        console.print(f"{name}: {own['description']}", highlight=False)
    for name, reason in content["skipped"].items():
        console.print(f"{name}: left out, {reason}", highlight=False)
    notes = dict.fromkeys(note for report in reports.values() for note in report["notes"])
    for note in notes:
        console.print(note, highlight=False)


def _table(reports: Mapping[str, Found]) -> Table:
    table = Table(title="accuracy over retrieval tasks in % with 95 % intervals, beside dense")
    table.add_column("variant", overflow="fold")
    columns = ("length", "dense", "accuracy", "difference", "attended %", "KV B/token", "KL")
    for column in (*columns, "same top 1"):
        table.add_column(column, justify="right", overflow="fold")
    for name, report in reports.items():
        for length in report["settings"]["lengths"]:
            table.add_row(name, str(length), *_row(report, length))
    return table


def _row(report: Found, length: int) -> list[str]:
    here = {
        kind: [line for line in report[kind] if line["length"] == length]
        for kind in ("cells", "averages", "agreements")
    }
    attended = [cell["attended"]["sparse"] for cell in here["cells"] if cell["attended"]]
    size = report["settings"]["kv_bytes_per_token"][str(length)]["sparse"]
    return [
        *_scores(here["averages"]),
        f"{100 * fmean(attended):.1f}" if attended else "",
        f"{size:,}",
        *_agreement(here["agreements"]),
    ]


def _scores(averages: Sequence[Found]) -> tuple[str, str, str]:
    by_name = {line["name"]: line for line in averages}
    line = next((by_name[name] for name in SHOWN_AVERAGES if name in by_name), None)
    if line is None:
        return "", "", ""
    dense, sparse = (Interval(**line["scores"][name]) for name in ("dense", "sparse"))
    difference = Interval(**line["differences"]["sparse"])
    return share_text(dense), share_text(sparse), points_text(difference)


def _agreement(agreements: Sequence[Found]) -> tuple[str, str]:
    for line in agreements:
        if line["prompt"] == "served":
            return f"{line['kl_mean']:.5f}", f"{100 * line['top1']['value']:.2f}"
    return "", ""
