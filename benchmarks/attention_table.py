"""Figures of `rtpurbo bench attention` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def prefill_table(records: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds, TFLOP/s on the unmasked work, and ratios."""
    columns = "tokens|flash ms|cudnn ms|window ms|TFLOP/s|retrieval ms|TFLOP/s|total ms|floor ms"
    columns += "|over flash|over cudnn|sparse over flash"
    table = _table("prefill attention of one layer", columns)
    for record in records:
        dense, ratio = record["dense_ms"], record["times_faster"]
        table.add_row(
            _thousands(record["tokens"]),
            *(_fixed(dense.get(name)) for name in ("flash", "cudnn")),
            _best(record["window_ms"]),
            f"{record['window_teraflops']:.0f}",
            _best(record["retrieval_ms"]),
            f"{record['retrieval_teraflops']:.0f}",
            _fixed(record["total_ms"]),
            _fixed(record["floor_ms"]),
            *(_times(ratio.get(name)) for name in ("flash", "cudnn")),
            _times(record["sparse_times_faster"].get("flash")),
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
    for name in ("flash", "cudnn"):
        ran = [record for record in records if name in record["dense_ms"]]
        times = [record["dense_ms"][name] for record in ran]
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


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K"
