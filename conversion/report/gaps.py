"""What a report does not tell, in plain words, so that nobody reads it into the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from conversion.evaluation.options import TEXT_TASK
from conversion.evaluation.report import EvalReport
from conversion.evaluation.ruler.tasks import RULER_TASKS
from conversion.report.contents import Contents
from conversion.report.section import counted

REFERENCES = ("dense", "teacher")


def unmeasured(contents: Contents) -> list[str]:
    """Sentences, the weightiest first."""
    groups = contents.groups()
    lines = [*_of_evaluations(contents, groups)] if groups else [
        "Accuracy, agreement with the dense model and tokens attended: no evaluation was run."
    ]  # fmt: skip
    if contents.indexer is None and contents.model.index_dim is not None:
        lines.append("How well the index selects: its quality is not known.")
    if contents.heads is None:
        lines.append("Why these heads were kept: their needle scores are not known.")
    elif contents.heads.causal_check is None:
        lines.append(
            "Whether each kept head is needed: heads were chosen by where they look "
            "(--causal-check measures what is lost without them)."
        )
    if contents.distil is None:
        lines.append("Stage 2: the weights are those of the dense model, nothing was distilled.")
    if not contents.ablations.variants:
        lines.append("What each part of the method is worth: no ablations were run.")
    lines.append("Speed and memory when serving; rtpurbo bench serving measures them.")
    return lines


def _of_evaluations(contents: Contents, groups: Sequence[EvalReport]) -> Iterator[str]:
    model = contents.model
    cells = [cell for group in groups for cell in group.cells]
    texts = [line for group in groups for line in group.agreements]
    lengths = sorted({*(cell.length for cell in cells), *(line.length for line in texts)})
    if not cells:
        yield "Accuracy: no task with answers was run."
    if not texts:
        yield f"Agreement with the dense model on text: the task {TEXT_TASK} was not run."
    if lengths and lengths[-1] <= model.window_tokens + model.sink_tokens:
        yield (
            f"Contexts longer than the window of {model.window_tokens:,} tokens: local heads saw "
            "everything in every sample."
        )
    if lengths and lengths[-1] < model.max_position_embeddings:
        yield (
            f"Contexts beyond {lengths[-1]:,} tokens; the model takes "
            f"{model.max_position_embeddings:,}."
        )
    yield from _of_tasks({cell.task for cell in cells})
    if width := _widest(groups):
        yield (
            f"Differences from the reference below about {100 * width:.1f} points: the widest "
            "interval of an average is that wide on each side."
        )
    if contents.distil is not None and not any("teacher" in own.variants for own in groups):
        yield (
            "The source model itself: the reference is the distilled weights with full attention "
            "(rtpurbo eval --teacher measures the source beside them)."
        )
    if not any(own.variants[0] in REFERENCES for own in groups):
        yield "A dense reference: every evaluation was of servers or of one kind of attention."


def _of_tasks(tasks: set[str]) -> Iterator[str]:
    missing = [task for task in RULER_TASKS if task not in tasks]
    if len(missing) == len(RULER_TASKS):
        yield "RULER: none of its tasks was run."
    elif missing:
        yield f"RULER in full: {counted(len(missing), 'task')} not run ({', '.join(missing)})."


def _widest(groups: Sequence[EvalReport]) -> float | None:
    """Half the widest interval of a difference, 0 to 1."""
    widths = [
        (gap.high - gap.low) / 2
        for group in groups
        for line in group.averages or group.by_task
        for gap in line.differences.values()
    ]
    return max(widths, default=None)
