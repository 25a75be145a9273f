"""What each part of the method is worth."""

from __future__ import annotations

from conversion.evaluation.intervals import Interval
from conversion.evaluation.tables import points_text, share_text
from conversion.report.ablation_lines import AblationLine
from conversion.report.contents import Contents
from conversion.report.section import (
    ABLATE,
    Block,
    Bullets,
    Missing,
    Paragraph,
    Picture,
    Section,
    Table,
)


def ablation_section(contents: Contents) -> Section:
    """The model with one part changed at a time."""
    title, lines = "Ablations", contents.ablation_lines()
    if not lines:
        missing = Missing("No ablations: what each part is worth is not known.", ABLATE)
        return Section("ablations", title, [missing])
    over = ", ".join(dict.fromkeys(line.over for line in lines if line.over is not None))
    blocks: list[Block] = []
    if over:
        blocks.append(Paragraph(f"Scores are averages over: {over}."))
        blocks.append(Picture("ablations.png", "Score of each variant with its 95 % interval."))
    blocks.append(
        Table(
            (
                "variant", "context, tokens", "score, %", "difference, points",
                "attended", "KV, B/token", "KL", "same best guess, %",
                "loss",
            ),
            [_row(line) for line in lines],
            "One part changed at a time; the first one is the model as converted. Difference from "
            "the dense reference; KL and loss of decoded text in nats",
        )
    )  # fmt: skip
    blocks.append(
        Bullets([f"{own.name}: {own.description}." for own in contents.ablations.variants])
    )
    skipped = contents.ablations.skipped or {}
    if skipped:
        blocks.append(Bullets([f"{name}: left out, {why}." for name, why in skipped.items()]))
    return Section("ablations", title, blocks)


def _row(line: AblationLine) -> tuple[str, ...]:
    return (
        line.name,
        f"{line.length:,}",
        _share(line.score),
        "" if line.difference is None else points_text(line.difference),
        "" if line.attended_share is None else f"{line.attended_share:.1%}",
        "" if line.kv_bytes is None else f"{line.kv_bytes:,}",
        "" if line.kl is None else f"{line.kl:.5f}",
        _share(line.top1),
        "" if line.loss is None else f"{line.loss:.4f}",
    )


def _share(interval: Interval | None) -> str:
    return "" if interval is None else share_text(interval)
