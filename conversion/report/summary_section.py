"""The first screen: what was made, what it costs, what it loses, what is not known."""

from __future__ import annotations

from collections.abc import Iterator

from conversion.evaluation.report import Average, EvalReport
from conversion.evaluation.tables import points_text, share_text
from conversion.report.contents import Contents
from conversion.report.gaps import unmeasured
from conversion.report.section import Block, Bullets, Heading, Section, Table, counted


def summary_section(contents: Contents) -> Section:
    """Always there."""
    lines = [*_model(contents), *_attended(contents), *_stages(contents), *_text(contents)]
    blocks: list[Block] = [Bullets(lines)]
    blocks += [accuracy_table(group) for group in contents.groups() if group.by_task]
    blocks += [Heading("Not measured"), Bullets(unmeasured(contents))]
    return Section("summary", "Summary", blocks)


def accuracy_table(report: EvalReport) -> Table:
    """Averages, or the tasks themselves where there is nothing to average."""
    lines: tuple[Average, ...] = report.averages or report.by_task
    first, *others = report.variants
    rows = [
        (
            line.name,
            f"{line.length:,}",
            str(len(line.tasks)),
            *(share_text(line.scores[name]) for name in report.variants),
            *(points_text(line.differences[name]) for name in others),
        )
        for line in lines
    ]
    columns = (
        "average over",
        "context, tokens",
        "tasks",
        *(f"{name}, %" for name in report.variants),
        *(f"{name} − {first}, points" for name in others),
    )
    return Table(columns, rows, f"Scores of {report.model} with 95 % intervals")


def _model(contents: Contents) -> Iterator[str]:
    model = contents.model
    source = "a dense model" if model.source is None else model.source
    yield (
        f"{model.name} is {source} ({model.family}: {counted(model.layers, 'layer')} of "
        f"{counted(model.query_heads, 'query head')} and {counted(model.kv_heads, 'KV head')}, "
        f"up to {model.max_position_embeddings:,} tokens) with sparse attention."
    )
    total = model.layers * model.query_heads
    reads = (
        "attend all of it"
        if model.index_dim is None
        else f"read what a {model.index_dim}-dimensional index selects"
    )
    yield (
        f"{model.kept:,} of {counted(total, 'query head')} ({model.kept / total:.1%}) keep the "
        f"whole context and {reads}. All others see the last {model.window_tokens:,} tokens and "
        f"the first {model.sink_tokens:,}."
    )
    dense, sparse = model.kv_growth_bytes_dense, model.kv_growth_bytes
    yield (
        f"One more token of context takes {sparse:,} bytes of KV cache in bfloat16, index keys "
        f"included, against {dense:,} dense ({dense / max(sparse, 1):.1f} times less): "
        f"{model.kept_kv:,} of {counted(model.layers * model.kv_heads, 'KV head')} keep the whole "
        "context."
    )
    longest = model.kv_costs[-1]
    yield (
        f"With the windows of the local heads, a sequence of {longest.length:,} tokens takes "
        f"{longest.sparse_bytes:,} bytes a token, {longest.sparse_bytes / longest.dense_bytes:.1%} "
        "of the dense cache."
    )


def _attended(contents: Contents) -> Iterator[str]:
    for points in contents.attended():
        if points:
            last = max(points, key=lambda point: point.length)
            yield (
                f"At {last.length:,} tokens of context a retrieval head attended "
                f"{last.tokens:,.0f} of them on average ({last.share:.1%}) while it answered."
            )


def _stages(contents: Contents) -> Iterator[str]:
    distil = contents.distil
    if distil is not None:
        yield (
            f"Distilled: at step {distil.best.step:,} the held-out gap was {distil.best.kl:.4f} "
            f"nats, {distil.before.kl:.4f} before; the best guess was the dense model's for "
            f"{distil.best.agreement:.1%} of the tokens, {distil.before.agreement:.1%} before."
        )


def _text(contents: Contents) -> Iterator[str]:
    for group in contents.groups():
        served = [line for line in group.agreements if line.prompt == "served"]
        if served:
            last = max(served, key=lambda line: line.length)
            yield (
                f"On {last.tokens:,} decoded tokens of text at {last.length:,} tokens of context, "
                f"{last.variant} and {group.variants[0]} had the same best guess for "
                f"{last.top1.value:.1%}, with a mean KL of {last.kl_mean:.4f} nats."
            )
