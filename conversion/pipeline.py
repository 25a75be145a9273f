"""`rtpurbo convert`: calibrate, fit, distil, export, report; each leaves its result on disk.

State lies beside the output in OUT.work:

    run.json              what is being made of what; another model or other options are refused
    heads.json            needle scores and the chosen heads; a person may edit `retrieval_heads`
    fit/                  the fit in progress, see `conversion.fit_step`
    indexer.safetensors   W_Q and W_K of every retrieval head
    quality.json          the heads they are for, and how well they select on text unseen by the fit
    student.safetensors   weights after distillation, and distil.json: how it went

A step whose file is there is not done again, so a conversion that was stopped goes on; only the fit
and what follows it are done again if the chosen heads have changed. Under torchrun several
processes share the documents of every step; the first one writes.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conversion.calibrate_step import DETAILS, CalibrateStep
from conversion.chunk_sizes import chunk_sizes
from conversion.convert_options import ConvertOptions
from conversion.distil import REPORT_FILE, STUDENT_FILE, distil
from conversion.document_feed import DocumentFeed
from conversion.errors import ConversionError
from conversion.export import export_model, refuse_existing
from conversion.fit_memory import describe, reading_bytes
from conversion.fit_step import FitStep, quality_line, quality_table
from conversion.head_roles import read_heads
from conversion.parallel import Ranks, joined
from conversion.report.report_folder import make_report
from conversion.state import model_digest, read_json, read_tensors, write_json, write_tensors
from conversion.text_source import TextSource, load_tokenizer
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.config import SparseAttentionConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder

__all__ = ["ConvertOptions", "ConvertRun", "convert"]

DISTIL_FACTS = ("stopped", "steps", "before", "best")  # of distil.json, for config.json


def convert(model: Path, out: Path, options: ConvertOptions, console: Console) -> None:
    """Make the sparse folder `out` of the dense folder `model`.

    Raises:
        CheckpointError: the model folder is unusable; one line that names the file.
        ConversionError: options, text, saved state or output are unusable; one line.
    """
    refuse_existing(out)
    checkpoint = preflight(model)
    with joined(options.device) as ranks:
        run = ConvertRun(checkpoint, out, options, console, ranks)
        run.open()
        run.calibrate()
        run.fit()
        run.distil()
        run.export()
        run.report()


class ConvertRun:
    """One conversion and its state on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        options: ConvertOptions,
        console: Console,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks` are the processes that share the work; this one alone by default."""
        self._ranks = ranks or Ranks(device=torch.device(options.device))
        self.checkpoint = checkpoint
        self.out = out
        self.options = options
        self.work = out.with_name(out.name + ".work")
        self._console = console if self._ranks.is_first else Console(quiet=True)
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
        if self._ranks.is_first and not path.exists():
            write_json(path, described)
        self._ranks.wait()
        if read_json(path) != described:
            raise ConversionError(
                f"{path}: this state is of another model or other options; remove {self.work}"
            )
        self._console.print(f"text: {self._source.description}; state: {self.work}")

    def calibrate(self) -> None:
        """Score the heads and choose."""
        path = self.work / "heads.json"
        if self._ranks.agreed(path.exists()):
            self._console.print(f"calibrate: done before, {path}")
            return
        options = self.options
        lengths = options.lengths(self._config.max_position_embeddings)
        self._announce("calibrate", options.documents * len(lengths), lengths[-1], 0)
        step = CalibrateStep(
            self._decoder(), self._source, self._tokenizer, options, self._ranks, self._console
        )
        heads = step.run()
        if self._ranks.is_first:
            write_json(path, heads)
        self._ranks.wait()

    def fit(self) -> None:
        """Fit the indexer and measure it on other text."""
        path, options = self.work / "quality.json", self.options.fit
        heads = self._heads()
        self._forget_other_fit(path, heads)
        if self._ranks.agreed(path.exists()):
            self._console.print(f"fit: done before, {path}")
            return
        documents = options.held_out + options.steps * options.documents_per_step(self._ranks.world)
        scores = chunk_sizes(self._ranks.device).scores
        self._announce("fit", documents, self._tokens, scores)
        seed = self.options.seed
        step = FitStep(
            self._decoder(),
            replace(self._config, sparse=self._wanted()),
            # Another order of the files than calibration's.
            DocumentFeed(
                self._source, self._tokenizer, self._tokens, 2 * seed + 1, options.held_out
            ),
            options,
            self.work / "fit",
            seed,
            self._ranks,
            self._console,
        )
        result = step.run()
        if self._ranks.is_first:
            write_tensors(self.work / "indexer.safetensors", result.indexers)
            content = {
                "retrieval_heads": heads,
                "top_p": [list(layer) for layer in result.sparse.top_p],
                "steps": len(result.losses),
                "losses": [round(loss, 5) for loss in result.losses],
                "heads": [quality_line(head) for head in result.quality],
            }
            write_json(path, content)
        self._ranks.wait()
        self._console.print(quality_table(result.quality))

    def _forget_other_fit(self, path: Path, heads: list[list[int]]) -> None:
        """Remove what was fitted for other heads; quality.json first, so that it never stands
        beside another fit's tensors."""
        begun = self.work / "fit" / "heads.json"
        if self._ranks.is_first:
            if path.exists() and read_json(path).get("retrieval_heads") != heads:
                self._console.print("fit: the chosen heads have changed, fitting again")
                path.unlink()
            if begun.exists() and read_json(begun) != heads:
                shutil.rmtree(begun.parent)
            if not begun.exists():
                begun.parent.mkdir(parents=True, exist_ok=True)
                write_json(begun, heads)
        self._ranks.wait()

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
        calibration = {key: heads[key] for key in heads if key not in DETAILS}
        quality = read_json(self.work / "quality.json")
        calibration["indexer"] = {
            "made": f"closed form and {quality['steps']} gradient steps",
            "heads": [
                {key: line[key] for key in line if key != "curve"} for line in quality["heads"]
            ],
        }
        indexers = read_tensors(self.work / "indexer.safetensors", self._config.num_layers)
        if trained is not None:
            report = read_json(self.work / REPORT_FILE)
            calibration["distil"] = {key: report[key] for key in DISTIL_FACTS}
        if self._ranks.is_first:
            export_model(self.checkpoint, self.out, self._sparse(), indexers, calibration, trained)
        self._ranks.wait()
        self._console.print(f"made {self.out}")

    def report(self) -> None:
        """Write OUT/report; `rtpurbo report` makes it again."""
        if self._ranks.is_first:
            page = make_report(self.out, self._tell, converting=True)
            self._tell(str(page))
        self._ranks.wait()

    def _tell(self, line: str) -> None:
        self._console.print(f"report: {line}", markup=False, highlight=False, soft_wrap=True)

    def _wanted(self) -> SparseAttentionConfig:
        """The section for the chosen heads, with the same top_p for all."""
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

    def _sparse(self) -> SparseAttentionConfig:
        """The section with the top_p that the fit has chosen."""
        top_p = read_json(self.work / "quality.json")["top_p"]
        return replace(self._wanted(), top_p=tuple(tuple(layer) for layer in top_p))

    def _heads(self) -> list[list[int]]:
        """The chosen heads as they stand on disk now."""
        config = self._config
        return read_heads(self.work / "heads.json", config.num_layers, config.num_heads)

    def _decoder(self) -> Decoder:
        """The model in float32 on a CPU, bfloat16 on CUDA; loaded when a step first needs it."""
        if self._loaded is None:
            device = self._ranks.device
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            self._loaded = load_decoder(self.checkpoint, str(device), dtype)
        return self._loaded

    def _announce(self, step: str, documents: int, tokens: int, chunk_scores: int) -> None:
        """Say what a step will read and need before it begins."""
        item = 4 if self._ranks.device.type == "cpu" else 2
        needed = reading_bytes(self.checkpoint, tokens, item, chunk_scores)
        self._console.print(f"{step}: {describe(documents, tokens, needed)}")

    def _describe(self) -> dict[str, Any]:
        """The model by its content and the options, comparable as JSON."""
        options = asdict(self.options)
        options["data"] = None if self.options.data is None else str(self.options.data)
        options["needle_lengths"] = list(self.options.needle_lengths)
        for name in ("device", "distil"):  # may change between two tries; distil checks its own
            del options[name]
        return {
            "model": self.checkpoint.folder.resolve().name,
            "model_sha256": model_digest(self.checkpoint),
            "options": options,
        }
