"""`rtpurbo convert`: calibrate, fit, distil, export; each step leaves its result on disk.

State lies beside the output in OUT.work:

    run.json              what is being made of what; another model or other options are refused
    heads.json            needle scores and the chosen heads; a person may edit `retrieval_heads`
    indexer.safetensors   W_Q and W_K of every retrieval head
    quality.json          the heads they are for, and how well they select on text unseen by the fit
    student.safetensors   weights after distillation, and distil.json: how it went

A step whose file is there is not done again, so a conversion that was stopped goes on; only the fit
and what follows it are done again if the chosen heads have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from conversion.calibration import NEEDLE_TOKENS, needle_document, needle_scores
from conversion.distil import REPORT_FILE, STUDENT_FILE, distil
from conversion.distil_options import DistilOptions
from conversion.errors import ConversionError
from conversion.export import export_model, refuse_existing
from conversion.head_roles import HeadRule, choose_heads, mean_scores, read_heads
from conversion.indexer_fit import HeadQuality, IndexerFit
from conversion.state import model_digest, read_json, read_tensors, write_json, write_tensors
from conversion.text_source import TextSource, load_tokenizer
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.config import IndexScope, SparseAttentionConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder

Advance = Callable[[], None]
DISTIL_FACTS = ("stopped", "steps", "before", "best")  # of distil.json, for config.json
FIT_DOCUMENTS, TRIAL_DOCUMENTS, QUALITY_DOCUMENTS = 3, 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to make. Sizes are in tokens."""

    data: Path | None = None  # text file or folder; None: Python sources of this environment
    heads_share: float = 0.15  # of all query heads
    heads_mass: float | None = None  # instead: share of the summed needle scores
    max_kv_heads: int | None = None  # keep heads of so many KV heads only
    window_tokens: int = 8192
    sink_tokens: int = 4
    index_dim: int = 16
    index_scope: IndexScope = "query_head"
    block_tokens: int = 64
    top_p: float = 0.9
    dense_below: int = 0  # context length below which retrieval heads decode densely
    documents: int = 4  # for the needle scores
    document_tokens: int = 8192  # at most the model's limit
    distil: DistilOptions | None = None  # stage 2; None leaves the weights as they are
    seed: int = 0
    device: str = "cpu"  # cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        self.rule()
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConversionError(f"device {self.device} is not there")
        if not 0 < self.top_p <= 1:
            raise ConversionError(f"top_p must be in (0, 1], got {self.top_p}")
        positive = ("window_tokens", "index_dim", "block_tokens", "documents", "document_tokens")
        for name, least in (*((name, 1) for name in positive), ("dense_below", 0)):
            if getattr(self, name) < least:
                raise ConversionError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.block_tokens & (self.block_tokens - 1):
            raise ConversionError(f"block_tokens must be a power of two, got {self.block_tokens}")
        if not 0 <= self.sink_tokens <= self.block_tokens:
            raise ConversionError(
                f"sink_tokens must be from 0 to block_tokens, got {self.sink_tokens}"
            )

    def rule(self) -> HeadRule:
        """How heads are chosen; raises ConversionError."""
        return HeadRule(self.heads_share, self.heads_mass, self.max_kv_heads)


def convert(model: Path, out: Path, options: ConvertOptions, console: Console) -> None:
    """Make the sparse folder `out` of the dense folder `model`.

    Raises:
        CheckpointError: the model folder is unusable; one line that names the file.
        ConversionError: options, text, saved state or output are unusable; one line.
    """
    refuse_existing(out)
    checkpoint = preflight(model)
    run = ConvertRun(checkpoint, out, options, console)
    run.open()
    run.calibrate()
    run.fit()
    run.distil()
    run.export()


class ConvertRun:
    """One conversion and its state on disk."""

    def __init__(
        self, checkpoint: Checkpoint, out: Path, options: ConvertOptions, console: Console
    ) -> None:
        self.checkpoint = checkpoint
        self.out = out
        self.options = options
        self.work = out.with_name(out.name + ".work")
        self._console = console
        self._config = replace(checkpoint.config, sparse=None)
        if options.index_dim > self._config.head_dim:
            raise ConversionError(
                f"index_dim {options.index_dim} is more than the model's head_dim "
                f"{self._config.head_dim}"
            )
        self._tokens = min(options.document_tokens, self._config.max_position_embeddings)
        self._tokenizer = load_tokenizer(checkpoint.folder)
        self._source = TextSource.find(options.data)
        self._loaded: Decoder | None = None

    def open(self) -> None:
        """Begin, or go on with what is there.

        Raises:
            ConversionError: the state is of another model or other options.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"{self.work}: cannot be made ({error.strerror})") from None
        described = self._describe()
        path = self.work / "run.json"
        if not path.exists():
            write_json(path, described)
        elif read_json(path) != described:
            raise ConversionError(
                f"{path}: this state is of another model or other options; remove {self.work}"
            )
        self._console.print(f"text: {self._source.description}; state: {self.work}")

    def calibrate(self) -> None:
        """Score the heads and choose."""
        path = self.work / "heads.json"
        if path.exists():
            self._console.print(f"calibrate: done before, {path}")
            return
        options = self.options
        texts = self._documents(options.documents, stream=0)
        needles = [self._with_needle(ids, number) for number, ids in enumerate(texts)]
        with self._progress("calibrate", len(needles)) as advance:
            scores = needle_scores(self._decoder(), needles, advance)
        mean = mean_scores(scores)
        chosen = choose_heads(mean, options.rule(), self._config.group_size)
        write_json(
            path,
            {
                "retrieval_heads": chosen,
                "chosen_by": options.rule().describe(),
                "text": self._source.description,
                "documents": options.documents,
                "document_tokens": self._tokens,
                "needle_tokens": NEEDLE_TOKENS,
                "scores": _rounded(mean),
                "scores_by_document": [_rounded(document) for document in scores],
            },
        )
        self._console.print(_head_table(mean, chosen))

    def fit(self) -> None:
        """Compute the indexer in closed form and measure it on other text."""
        config, path = replace(self._config, sparse=self._sparse()), self.work / "quality.json"
        if path.exists():
            if read_json(path).get("retrieval_heads") == self._heads():
                self._console.print(f"fit: done before, {path}")
                return
            self._console.print("fit: the chosen heads have changed, fitting again")
            path.unlink()  # first, so that it never stands beside another fit's tensors
        total = FIT_DOCUMENTS + TRIAL_DOCUMENTS + QUALITY_DOCUMENTS
        texts = self._documents(total, stream=1)
        plain, rest = texts[:FIT_DOCUMENTS], texts[FIT_DOCUMENTS:]
        planted = [self._with_needle(ids, 100 + number).ids for number, ids in enumerate(rest)]
        fit = IndexerFit(self._decoder(), config, self.options.seed)
        with self._progress("fit", total) as advance:
            fit.fit(plain, planted[:TRIAL_DOCUMENTS], NEEDLE_TOKENS, advance)
            quality = fit.quality(planted[TRIAL_DOCUMENTS:], NEEDLE_TOKENS, advance)
        write_tensors(self.work / "indexer.safetensors", fit.indexers())
        lines = [_line(head) for head in quality]
        write_json(path, {"retrieval_heads": self._heads(), "heads": lines})
        self._console.print(_quality_table(quality))

    def distil(self) -> None:
        """Adapt the weights to the heads' roles, if that is asked for."""
        if self.options.distil is None:
            self._console.print("distil: not asked for, the weights stay as they are")
            return
        self._loaded = None  # stage 2 loads the model itself
        distil(
            self.checkpoint,
            self._sparse(),
            read_tensors(self.work / "indexer.safetensors", self._config.num_layers),
            self._tokenizer,
            self._source,
            self.work,
            self.options.distil,
            self._console,
        )

    def export(self) -> None:
        """Write the output folder."""
        trained = self.work / STUDENT_FILE if self.options.distil is not None else None
        heads = read_json(self.work / "heads.json")
        calibration = {key: heads[key] for key in heads if key != "scores_by_document"}
        calibration["indexer"] = {
            "made": "closed form, no gradient steps",
            "heads": read_json(self.work / "quality.json")["heads"],
        }
        indexers = read_tensors(self.work / "indexer.safetensors", self._config.num_layers)
        if trained is not None:
            report = read_json(self.work / REPORT_FILE)
            calibration["distil"] = {key: report[key] for key in DISTIL_FACTS}
        export_model(self.checkpoint, self.out, self._sparse(), indexers, calibration, trained)
        self._console.print(f"made {self.out}")

    def _sparse(self) -> SparseAttentionConfig:
        options = self.options
        heads = tuple(tuple(layer) for layer in self._heads())
        return SparseAttentionConfig(
            retrieval_heads=heads,
            window_tokens=options.window_tokens,
            sink_tokens=options.sink_tokens,
            index_dim=options.index_dim,
            index_scope=options.index_scope,
            block_tokens=options.block_tokens,
            top_p=tuple(tuple(options.top_p for _ in layer) for layer in heads),
            dense_below=options.dense_below,
        )

    def _heads(self) -> list[list[int]]:
        """The chosen heads as they stand on disk now."""
        config = self._config
        return read_heads(self.work / "heads.json", config.num_layers, config.num_heads)

    def _decoder(self) -> Decoder:
        """The model in float32 on a CPU, bfloat16 on CUDA; loaded when a step first needs it."""
        if self._loaded is None:
            on_cpu = self.options.device == "cpu"
            dtype = torch.float32 if on_cpu else torch.bfloat16
            self._loaded = load_decoder(self.checkpoint, self.options.device, dtype)
        return self._loaded

    def _documents(self, count: int, stream: int) -> list[list[int]]:
        """Text that no other step sees, as far as the source has that much."""
        seed = 2 * self.options.seed + stream
        return self._source.documents(self._tokenizer, count, self._tokens, seed)

    def _with_needle(self, ids: list[int], number: int) -> Any:
        return needle_document(ids, self._tokenizer, NEEDLE_TOKENS, self.options.seed + number)

    def _describe(self) -> dict[str, Any]:
        """The model by its content and the options, comparable as JSON."""
        options = asdict(self.options)
        options["data"] = None if self.options.data is None else str(self.options.data)
        for name in ("device", "distil"):  # may change between two tries; distil checks its own
            del options[name]
        return {
            "model": self.checkpoint.folder.resolve().name,
            "model_sha256": model_digest(self.checkpoint),
            "options": options,
        }

    @contextmanager
    def _progress(self, name: str, total: int) -> Iterator[Advance]:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda: progress.advance(task)


def _line(head: HeadQuality) -> dict[str, Any]:
    """One head of quality.json, numbers short enough to read."""
    values = asdict(head)
    for kind in ("anywhere", "needle"):
        values[kind] = {name: round(value, 4) for name, value in values[kind].items()}
    return values


def _rounded(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in layer] for layer in scores]


def _head_table(scores: Sequence[Sequence[float]], chosen: Sequence[Sequence[int]]) -> Table:
    table = Table(title="retrieval heads")
    for column in ("layer", "heads", "needle scores"):
        table.add_column(column)
    for layer, heads in enumerate(chosen):
        if heads:
            values = ", ".join(f"{scores[layer][head]:.3f}" for head in heads)
            table.add_row(str(layer), ", ".join(map(str, heads)), values)
    return table


def _quality_table(quality: Sequence[HeadQuality]) -> Table:
    table = Table(title="indexer on unseen text: mass kept / blocks / blocks the teacher needs")
    for column in ("layer, head", "at a repeated needle", "anywhere"):
        table.add_column(column)
    for head in quality:
        cells = [
            f"{q.kept_mass:.3f} / {q.blocks:.1f} / {q.teacher_blocks:.1f}"
            for q in (head.needle, head.anywhere)
        ]
        table.add_row(f"{head.layer}, {head.head}", *cells)
    return table
