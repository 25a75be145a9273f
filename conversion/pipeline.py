"""`rtpurbo convert`: calibrate, fit, distil, export, report; each leaves its result on disk.

State lies beside the output in OUT.work, see `conversion.work_folder`. A step whose file is there
is not done again, so a conversion that was stopped goes on; only the fit and what follows it are
done again if the chosen heads have changed. Under torchrun several processes share the documents of
every step; the first one writes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from conversion.calibrate_step import CalibrateStep
from conversion.chunk_sizes import chunk_sizes
from conversion.convert_options import ConvertOptions
from conversion.distil import STUDENT_FILE, distil
from conversion.document_feed import DocumentFeed
from conversion.errors import ConversionError
from conversion.export import export_model, refuse_existing
from conversion.fit_memory import describe, reading_bytes
from conversion.fit_step import FitStep, quality_table
from conversion.parallel import Ranks, joined
from conversion.report.report_folder import make_report
from conversion.text_source import TextSource, load_tokenizer
from conversion.work_folder import WorkFolder
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.config import SparseAttentionConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder

__all__ = ["ConvertOptions", "ConvertRun", "convert"]


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
        self._console = console if self._ranks.is_first else Console(quiet=True)
        self._config = replace(checkpoint.config, sparse=None)
        if options.index_dim > self._config.head_dim:
            raise ConversionError(
                f"index_dim {options.index_dim} is more than the model's head_dim "
                f"{self._config.head_dim}"
            )
        self.work = WorkFolder(out.with_name(out.name + ".work"), self._config, self._ranks)
        self._tokens = min(options.document_tokens, self._config.max_position_embeddings)
        self._tokenizer = load_tokenizer(checkpoint.folder)
        self._source = TextSource.find(options.data)
        self._loaded: Decoder | None = None

    def open(self) -> None:
        """Begin, or go on with what is there.

        Raises:
            ConversionError: the state is of another model or other options.
        """
        self.work.begin(self.checkpoint, self.options)
        self._console.print(f"text: {self._source.description}; state: {self.work.path}")

    def calibrate(self) -> None:
        """Score the heads and choose."""
        path = self.work.heads_file
        if self._ranks.agreed(path.exists()):
            self._console.print(f"calibrate: done before, {path}")
            return
        options = self.options
        lengths = options.lengths(self._config.max_position_embeddings)
        self._announce("calibrate", options.documents * len(lengths), lengths[-1], 0)
        step = CalibrateStep(
            self._decoder(), self._source, self._tokenizer, options, self._ranks, self._console
        )
        self.work.write_heads(step.run())

    def fit(self) -> None:
        """Fit the indexer and measure it on other text."""
        path, options = self.work.quality_file, self.options.fit
        heads = self.work.heads()
        if self.work.forget_other_fit(heads):
            self._console.print("fit: the chosen heads have changed, fitting again")
        if self._ranks.agreed(path.exists()):
            self._console.print(f"fit: done before, {path}")
            return
        documents = options.held_out + options.steps * options.documents_per_step(self._ranks.world)
        scores = chunk_sizes(self._ranks.device).scores
        self._announce("fit", documents, self._tokens, scores)
        seed = self.options.seed
        step = FitStep(
            self._decoder(),
            replace(self._config, sparse=self.options.section(heads)),
            # Another order of the files than calibration's.
            DocumentFeed(
                self._source, self._tokenizer, self._tokens, 2 * seed + 1, options.held_out
            ),
            options,
            self.work.fit_folder,
            seed,
            self._ranks,
            self._console,
            self._far_feed(),
        )
        result = step.run()
        self.work.write_fit(heads, result)
        self._console.print(quality_table(result.quality))

    def _far_feed(self) -> DocumentFeed | None:
        """Documents for the biases of old ages: longer than the fit's, or none."""
        options, seed = self.options.fit, self.options.seed
        tokens = min(options.age_tokens, self._config.max_position_embeddings)
        if not options.age_tokens:
            return None
        if tokens <= self._tokens:
            self._console.print(
                f"old ages: documents of {tokens} tokens reach no further than the fit's"
            )
            return None
        self._announce("old ages", options.age_documents, tokens, 0)
        # Another order of the files again: the fit is measured on text that it has not seen.
        return DocumentFeed(
            self._source, self._tokenizer, tokens, 2 * seed + 2, options.age_documents
        )

    def distil(self) -> None:
        """Adapt the weights to the heads' roles, if that is asked for."""
        if self.options.distil is None:
            self._console.print("distil: not asked for, the weights stay as they are")
            return
        self._loaded = None  # stage 2 loads the model itself
        distil(
            self.checkpoint,
            self._sparse(),
            self.work.indexers(),
            self._tokenizer,
            self._source,
            self.work.path,
            self.options.distil,
            self._console,
        )

    def export(self) -> None:
        """Write the output folder."""
        trained = self.work.path / STUDENT_FILE if self.options.distil is not None else None
        summary = self.work.summary(distilled=trained is not None)
        indexers = self.work.indexers()
        if self._ranks.is_first:
            export_model(self.checkpoint, self.out, self._sparse(), indexers, summary, trained)
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

    def _sparse(self) -> SparseAttentionConfig:
        """The section with the top_p that the fit has chosen."""
        return replace(self.options.section(self.work.heads()), top_p=self.work.top_p())

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
