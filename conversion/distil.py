"""Stage 2 from beginning to end: the teacher's answers on disk, training, the result in its place.

The teacher is the same model before training, with dense attention. Left in the work folder:

    student.safetensors   the trained weights, by checkpoint name, in the checkpoint's dtypes
    distil.json           losses, gaps, why it stopped; written last
    teacher/              the teacher's answers, see `conversion.teacher_logits`
    training/             while training: see `conversion.training_state`
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from conversion.distil_data import JsonlRows, Sample, text_samples
from conversion.distil_memory import estimate_memory
from conversion.distil_options import DistilOptions
from conversion.distillation import Distillation
from conversion.errors import ConversionError
from conversion.parallel import Ranks, joined
from conversion.progress_bar import progress_bar
from conversion.state import model_digest, read_json, write_json
from conversion.stop_rule import best
from conversion.student import Student
from conversion.student_layers import StudentLayers
from conversion.teacher_logits import TeacherCache
from conversion.text_source import TextSource
from conversion.training_state import Progress as TrainingProgress
from conversion.training_state import TrainingState
from engine.model.checkpoint import Checkpoint
from engine.model.config import SparseAttentionConfig
from engine.model.decoder import Indexer

STUDENT_FILE, REPORT_FILE = "student.safetensors", "distil.json"
FREE_OPTIONS = ("device", "micro_tokens", "recompute")  # may change between two tries
DATA_OPTIONS = (
    "data",
    "sequence_tokens",
    "response_tokens",
    "sequences",
    "validation_sequences",
    "facts_share",
    "seed",
)


def distil(
    checkpoint: Checkpoint,
    sparse: SparseAttentionConfig,
    indexers: Sequence[Indexer | None],
    tokenizer: Tokenizer,
    source: TextSource,
    work: Path,
    options: DistilOptions,
    console: Console,
) -> dict[str, Any]:
    """Train, or go on with a training that was stopped; returns what distil.json holds.

    Under torchrun every process calls this with the same arguments.

    Args:
        checkpoint: the dense model.
        sparse: head roles of the student.
        indexers: per layer, fitted to them; they stay as they are.
        source: text to make sequences of, unless `options.data` names a JSONL file.
        work: folder of the conversion's state.

    Raises:
        CheckpointError: the model has become unreadable.
        ConversionError: options, data or saved state are unusable; one line.
    """
    limit = checkpoint.config.max_position_embeddings
    options = replace(options, sequence_tokens=min(options.sequence_tokens, limit))
    described = _describe(checkpoint, sparse, indexers, source, options)
    with joined(options.device) as ranks:
        if ranks.agreed(_is_done(work, described)):
            found: dict[str, Any] = read_json(work / REPORT_FILE)
            return found
        if options.batch % ranks.world:
            raise ConversionError(
                f"batch {options.batch} must be a multiple of {ranks.world}, the processes"
            )
        talk = console if ranks.is_first else Console(quiet=True)
        talk.print(f"distil: {estimate_memory(checkpoint, sparse, options, ranks.world)}")
        dtype = torch.float32 if ranks.device.type == "cpu" else torch.bfloat16
        student = Student(checkpoint, ranks, dtype, recompute=options.recompute)
        cache = TeacherCache(work / "teacher", _of_teacher(described), ranks)
        if not cache.is_complete:
            _fill(cache, student, _samples(source, tokenizer, options), options, talk)
        layers = StudentLayers(
            replace(checkpoint.config, sparse=sparse), indexers, student.device, student.dtype
        )
        state = TrainingState(work / "training", described, ranks)
        progress = Distillation(student, layers, cache, options, ranks).run(state, talk)
        return _finish(progress, state, work, described, ranks, talk)


def _is_done(work: Path, described: dict[str, Any]) -> bool:
    """Whether this very training has ended before."""
    report, student = work / REPORT_FILE, work / STUDENT_FILE
    if not (report.exists() and student.exists()):
        return False
    found = read_json(report)
    return isinstance(found, dict) and found.get("of") == described


def _samples(source: TextSource, tokenizer: Tokenizer, options: DistilOptions) -> Iterator[Sample]:
    """All sequences that there are; raises ConversionError."""
    tokens, response, seed = options.sequence_tokens, options.response_tokens, options.seed
    if options.data is not None:
        rows = JsonlRows.open(options.data)
        return rows.samples(tokenizer, tokens=tokens, response=response, seed=seed)
    return text_samples(
        source,
        tokenizer,
        tokens=tokens,
        response=response,
        facts_share=options.facts_share,
        seed=seed,
    )


def _fill(
    cache: TeacherCache,
    student: Student,
    samples: Iterator[Sample],
    options: DistilOptions,
    console: Console,
) -> None:
    limit = options.sequences + options.validation_sequences
    done = 0
    with progress_bar(console, "teacher", limit) as advance:
        for filled in cache.fill(student, samples, options.micro_tokens, limit):
            advance(pieces=filled - done)
            done = filled
    if done < limit:
        console.print(f"the text gave {done} of {limit} sequences")


def _finish(
    progress: TrainingProgress,
    state: TrainingState,
    work: Path,
    described: dict[str, Any],
    ranks: Ranks,
    console: Console,
) -> dict[str, Any]:
    """Put the best weights and the report in place; the report is written last."""
    smallest = best(progress.curve)
    report = {
        "stopped": progress.stopped,
        "steps": progress.step,
        "best": asdict(smallest),
        "before": asdict(progress.curve[0]),
        "validations": [asdict(gap) for gap in progress.curve],
        "losses": [round(loss, 6) for loss in progress.losses],
        "of": described,
    }
    if ranks.is_first:
        kept = state.best_file(smallest.step)
        if kept.exists():  # else it was put in place before this process was stopped
            os.replace(kept, work / STUDENT_FILE)
        write_json(work / REPORT_FILE, report)
        shutil.rmtree(work / "training", ignore_errors=True)
    ranks.wait()
    first = progress.curve[0]
    console.print(
        f"distil: {progress.stopped}; kept step {smallest.step}: KL {first.kl:.6f} -> "
        f"{smallest.kl:.6f}, agreement {first.agreement:.4f} -> {smallest.agreement:.4f}"
    )
    return report


def _describe(
    checkpoint: Checkpoint,
    sparse: SparseAttentionConfig,
    indexers: Sequence[Indexer | None],
    source: TextSource,
    options: DistilOptions,
) -> dict[str, Any]:
    """What is trained on what and how, as JSON values."""
    weights = sha256()
    for indexer in filter(None, indexers):
        for weight in (indexer.q_proj_HID, indexer.k_proj_HID, indexer.age_bias_HA):
            if weight is not None:
                weights.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    settings = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    settings["data"] = None if options.data is None else str(options.data)
    heads = asdict(sparse)
    heads["retrieval_heads"] = [list(layer) for layer in sparse.retrieval_heads]
    heads["top_p"] = [list(layer) for layer in sparse.top_p]
    return {
        "model_sha256": model_digest(checkpoint),
        "indexers_sha256": weights.hexdigest(),
        "text": source.description if options.data is None else _file(options.data),
        "sparse": heads,
        "options": settings,
    }


def _of_teacher(described: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that the teacher's answers depend on."""
    options = {name: described["options"][name] for name in DATA_OPTIONS}
    return {name: described[name] for name in ("model_sha256", "text")} | {"options": options}


def _file(path: Path) -> str:
    """A file by name and size; one that is missing is refused where it is read."""
    return f"{path} ({path.stat().st_size} bytes)" if path.is_file() else str(path)
