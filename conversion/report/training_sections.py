"""The index and both training stages."""

from __future__ import annotations

from conversion.index_quality import IndexQuality
from conversion.report.contents import Contents
from conversion.report.facts import DistilFacts, IndexedHead, IndexerFacts
from conversion.report.section import (
    CONVERT,
    Block,
    Missing,
    Paragraph,
    Picture,
    Section,
    Table,
)

KINDS = (("anywhere", "any position"), ("answers", "answers"))


def indexer_section(contents: Contents) -> Section:
    """Quality per head, if it is known."""
    title, indexer = "Indexer", contents.indexer
    if indexer is None:
        missing = Missing("The quality of the index is not known.", CONVERT)
        return Section("indexer", title, [missing])
    blocks: list[Block] = [
        Paragraph(
            "Measured on text unseen by the fit, at sampled positions and at answers (needles and "
            "planted facts, which only far attention can predict). Blocks are pages of "
            f"{contents.model.block_tokens} tokens; the teacher's are those that the same rule "
            "selects with the true attention. KL is of the true attention from the index's."
        )
    ]
    if indexer.mean_curve("anywhere"):
        blocks.append(
            Picture(
                "kept-mass.png",
                "Attention mass in the selected blocks over top_p, a thin line per head.",
            )
        )
    blocks += [
        Picture(
            "blocks.png",
            "Left: blocks selected against blocks needed, a point per head and kind of query. "
            "Right: KL after training against the closed form; below the line is better.",
        ),
        _means_table(indexer),
        _age_bias(indexer),
    ]
    if indexer.mean_curve("anywhere"):
        blocks.append(_curve_table(indexer))
    blocks.append(_head_table(indexer))
    return Section("indexer", title, blocks)


def training_section(contents: Contents) -> Section:
    """Losses of both stages, as far as they are known."""
    indexer, distil = contents.indexer, contents.distil
    blocks: list[Block] = []
    if (indexer is not None and indexer.losses) or (
        distil is not None and (distil.losses or distil.validations)
    ):
        blocks.append(Picture("training.png", "Losses by step, and the gap on held-out sequences."))
    if indexer is not None and indexer.losses:
        first, last = indexer.losses[0], indexer.losses[-1]
        blocks.append(
            Paragraph(
                f"Fit: {len(indexer.losses):,} steps, KL {first:.3f} nats per query at the first, "
                f"{last:.3f} at the last (each on a document of its own)."
            )
        )
    else:
        blocks.append(
            Missing("Fit: no losses; the closed form was kept or its state is gone.", CONVERT)
        )
    if distil is None:
        blocks.append(
            Missing(
                "Distillation was not run; the weights are the dense model's.",
                f"{CONVERT} --distil",
            )
        )
    else:
        blocks.append(Paragraph(f"Distillation: {distil.stopped}, after {distil.steps:,} steps."))
        blocks.append(_gap_table(distil))
    return Section("training", "Training", blocks)


def _quality_cells(quality: IndexQuality) -> tuple[str, ...]:
    ratio = quality.blocks / quality.teacher_blocks if quality.teacher_blocks else float("nan")
    return (
        f"{quality.kl:.3f}",
        f"{quality.kept_mass:.3f}",
        f"{quality.blocks:.1f}",
        f"{quality.teacher_blocks:.1f}",
        f"{ratio:.2f}",
        f"{quality.blocks / quality.context_blocks:.1%}" if quality.context_blocks else "",
    )


QUALITY_COLUMNS = ("KL, nats", "mass kept", "blocks", "teacher's", "ratio", "of context")


def _means_table(indexer: IndexerFacts) -> Table:
    rows = [
        (name, "closed form" if closed else "trained", *_quality_cells(indexer.mean(kind, closed)))
        for kind, name in KINDS
        for closed in (True, False)
    ]
    return Table(("queries", "indexer", *QUALITY_COLUMNS), rows, "Means over the heads", words=2)


def _age_bias(indexer: IndexerFacts) -> Block:
    if not indexer.has_age_bias:
        return Paragraph("The index has no bias for ages: it does not tell near from far.")
    return Picture(
        "age-bias.png",
        "What is added to the log mass of a block for its age, a line per head. Only differences "
        "count; older blocks than any of the fit's documents get what the oldest of them get.",
    )


def _curve_table(indexer: IndexerFacts) -> Table:
    rows = [
        (name, f"{top_p:g}", *_quality_cells(quality)[1:])
        for kind, name in KINDS
        for top_p, quality in indexer.mean_curve(kind)
    ]
    columns = ("queries", "top_p", *QUALITY_COLUMNS[1:])
    return Table(columns, rows, "What other values of top_p would give, means over the heads")


def _head_table(indexer: IndexerFacts) -> Table:
    rows = [row for head in indexer.heads for row in _head_rows(head)]
    columns = ("layer", "head", "queries", "top_p", *QUALITY_COLUMNS)
    return Table(columns, rows, "Every retrieval head", words=3)


def _head_rows(head: IndexedHead) -> list[tuple[str, ...]]:
    place = (str(head.layer), str(head.head))
    return [
        (*place, name, f"{head.setting.top_p:g}", *_quality_cells(getattr(head, kind)))
        for kind, name in KINDS
    ]


def _gap_table(distil: DistilFacts) -> Table:
    gaps = distil.validations or (distil.before, distil.best)
    rows = [
        (f"{gap.step:,}", f"{gap.kl:.5f}", f"{gap.agreement:.2%}", kept)
        for gap in gaps
        for kept in ("kept" if gap == distil.best else "",)
    ]
    return Table(
        ("step", "KL, nats per token", "same best guess", ""), rows, "Held-out sequences", words=0
    )
