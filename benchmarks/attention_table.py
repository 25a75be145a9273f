"""Figures of `rtpurbo bench attention` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.attention_targets import length_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PEERS = ("flash", "cudnn", "flashinfer")


def prefill_table(records: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds, TFLOP/s on the unmasked work, and ratios."""
    columns = "tokens|flash ms|cudnn ms|flashinfer ms|window ms|TFLOP/s|of flashinfer|retrieval ms"
    columns += "|TFLOP/s|total ms|floor ms|over flash|over fastest|sparse over flash"
    table = _table("prefill attention of one layer", columns)
    for record in records:
        dense, ratio = record["dense_ms"], record["times_faster"]
        table.add_row(
            length_name(record["tokens"]),
            *(_fixed(dense.get(name)) for name in PEERS),
            _best(record["window_ms"]),
            f"{record['window_teraflops']:.0f}",
            _fixed(record["window_peer"].get("teraflops")),
            _best(record["retrieval_ms"]),
            f"{record['retrieval_teraflops']:.0f}",
            _fixed(record["total_ms"]),
            _fixed(record["floor_ms"]),
            _times(ratio.get("flash")),
            f"{_times(min(ratio.values(), default=None))} {record['fastest_dense'] or ''}",
            _times(record["sparse_times_faster"].get("flash")),
        )
    return table


def decode_table(records: Sequence[dict[str, Any]]) -> Table:
    """Microseconds of a layer, its parts, shares of the copy bandwidth, and ratios."""
    columns = "rows x context|share|flash|cudnn|flashinfer|sparse|over fastest|select|of copy"
    columns += "|attention|of copy|local|retrieval|floor|int8|over fastest|select|of copy"
    table = _table("decode attention of one layer, microseconds", columns)
    for record in records:
        dense, sparse, int8 = record["dense"], record["sparse"], record["sparse"]["int8"]
        table.add_row(
            f"{record['rows']} x {length_name(record['context'])}",
            f"{sparse['attended_fraction']:.1%}",
            *(_fixed(dense.get(name)) for name in PEERS),
            _fixed(sparse["microseconds"]),
            _times(record["ratio"]),
            _fixed(sparse["select_microseconds"]),
            f"{sparse['select_share_of_copy']:.0%}",
            _fixed(sparse["attention_microseconds"]),
            f"{sparse['attention_share_of_copy']:.0%}",
            _fixed(sparse["local_microseconds"]),
            _fixed(sparse["retrieval_microseconds"]),
            _fixed(sparse["floor_microseconds"]),
            _fixed(int8["microseconds"]),
            _times(record["int8_ratio"]),
            _fixed(int8["select_microseconds"]),
            f"{int8['select_share_of_copy']:.0%}",
        )
    return table


def targets_table(targets: Sequence[dict[str, Any]]) -> Table:
    """What was aimed at beside what was measured."""
    table = _table("targets", "where|what|at least|measured|")
    verdicts = {None: "not measured", True: "hit", False: "missed"}
    for target in targets:
        figure, unit = target["figure"], target["unit"]
        table.add_row(
            target["where"],
            target["what"],
            f"{target['least']:g} {unit}",
            "-" if figure is None else f"{figure:.2f} {unit}",
            verdicts[target["hit"]],
        )
    return table


def plot(result: dict[str, Any], path: Path) -> None:
    """Prefill times by length beside decode ratios, whichever there are; a PNG or as named."""
    from matplotlib.figure import Figure

    panels = [
        (draw, result[part])
        for draw, part in ((_draw_prefill, "prefill"), (_draw_decode, "decode"))
        if result[part]
    ]
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for place, (draw, records) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        draw(axes, records)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _draw_prefill(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for name in PEERS:
        ran = [record for record in records if name in record["dense_ms"]]
        times = [record["dense_ms"][name] for record in ran]
        if ran:
            axes.plot([r["tokens"] for r in ran], times, marker="o", label=f"dense, {name}")
    tokens = [record["tokens"] for record in records]
    axes.plot(tokens, [record["total_ms"] for record in records], marker="o", label="head-wise")
    axes.plot(tokens, [record["floor_ms"] for record in records], ls="--", label="its floor")
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="milliseconds")
    axes.set_title("prefill, one layer")


def _draw_decode(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for rows, style in ((1, "-"), (8, "--")):
        for place, share in enumerate(sorted({record["share"] for record in records})):
            mine = [r for r in records if (r["rows"], r["share"]) == (rows, share)]
            points = [record["context"] for record in mine], [record["ratio"] for record in mine]
            label = f"{share:.0%} of the blocks, batch {rows}"
            if mine:
                axes.plot(*points, ls=style, marker="o", color=f"C{place}", label=label)
    axes.set(xscale="log", xlabel="context tokens", ylabel="times faster than dense")
    axes.set_title("decode, one layer")


def _table(title: str, columns: str) -> Table:
    table = Table(title=title)
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    return table


def _best(found: dict[str, float]) -> str:
    name = min(found, key=found.__getitem__)
    return f"{found[name]:.1f} {name}"


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
