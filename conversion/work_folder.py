"""OUT.work: what a conversion has come to, so that one that was stopped goes on.

    run.json              what is being made of what; another model or other options are refused
    heads.json            needle scores and the chosen heads; a person may edit `retrieval_heads`
    fit/                  the fit in progress, see `conversion.fit_step`
    indexer.safetensors   W_Q, W_K and bias for ages of every retrieval head
    quality.json          the heads they are for, and how well they select on text unseen by the fit
    student.safetensors   weights after distillation, and distil.json: how it went

Under torchrun all processes call the methods that write: the first one writes, and none goes on
before it has.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.calibrate_step import DETAILS
from conversion.convert_options import ConvertOptions
from conversion.distil import REPORT_FILE
from conversion.errors import ConversionError
from conversion.fit_step import FitResult, quality_line
from conversion.head_roles import read_heads
from conversion.parallel import Ranks
from conversion.state import model_digest, read_json, read_tensors, write_json, write_tensors
from engine.model.checkpoint import Checkpoint
from engine.model.config import ModelConfig
from engine.model.decoder import Indexer

DISTIL_FACTS = ("stopped", "steps", "before", "best")  # of distil.json, for config.json


class WorkFolder:
    """The state of one conversion; every method raises ConversionError where a file is unusable."""

    def __init__(self, path: Path, config: ModelConfig, ranks: Ranks) -> None:
        """
        Args:
            path: made by `begin`.
            config: of the dense model.
            ranks: the processes that share the work.
        """
        self.path = path
        self.heads_file = path / "heads.json"
        self.quality_file = path / "quality.json"
        self.fit_folder = path / "fit"
        self._indexer_file = path / "indexer.safetensors"
        self._config = config
        self._ranks = ranks

    def begin(self, checkpoint: Checkpoint, options: ConvertOptions) -> None:
        """Make the folder, or see that what is there is of this model and of these options."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"{self.path}: cannot be made ({error.strerror})") from None
        described = _described(checkpoint, options)
        file = self.path / "run.json"
        if self._ranks.is_first and not file.exists():
            write_json(file, described)
        self._ranks.wait()
        if read_json(file) != described:
            raise ConversionError(
                f"{file}: this state is of another model or other options; remove {self.path}"
            )

    def heads(self) -> list[list[int]]:
        """The chosen heads as they stand on disk now, by layer."""
        return read_heads(self.heads_file, self._config.num_layers, self._config.num_heads)

    def write_heads(self, content: dict[str, Any]) -> None:
        """What calibration has found: the content of heads.json."""
        if self._ranks.is_first:
            write_json(self.heads_file, content)
        self._ranks.wait()

    def forget_other_fit(self, heads: list[list[int]]) -> bool:
        """Remove what was fitted for other heads; quality.json first, so that it never stands
        beside another fit's tensors. True where this process has removed a finished fit."""
        forgotten, begun = False, self.fit_folder / "heads.json"
        if self._ranks.is_first:
            if self.quality_file.exists():
                forgotten = read_json(self.quality_file).get("retrieval_heads") != heads
            if forgotten:
                self.quality_file.unlink()
            if begun.exists() and read_json(begun) != heads:
                shutil.rmtree(self.fit_folder)
            if not begun.exists():
                self.fit_folder.mkdir(parents=True, exist_ok=True)
                write_json(begun, heads)
        self._ranks.wait()
        return forgotten

    def write_fit(self, heads: list[list[int]], result: FitResult) -> None:
        """The indexers of `heads`, then quality.json, which says that the fit is done."""
        if self._ranks.is_first:
            write_tensors(self._indexer_file, result.indexers)
            content = {
                "retrieval_heads": heads,
                "top_p": [list(layer) for layer in result.sparse.top_p],
                "steps": len(result.losses),
                "losses": [round(loss, 5) for loss in result.losses],
                "heads": [quality_line(head) for head in result.quality],
            }
            write_json(self.quality_file, content)
        self._ranks.wait()

    def top_p(self) -> tuple[tuple[float, ...], ...]:
        """What the fit has chosen for each head, by layer."""
        return tuple(tuple(layer) for layer in read_json(self.quality_file)["top_p"])

    def indexers(self) -> list[Indexer | None]:
        """The fitted ones, by layer."""
        return read_tensors(self._indexer_file, self._config.num_layers)

    def summary(self, *, distilled: bool) -> dict[str, Any]:
        """How the model was made, for config.json: all of the state but its long lists."""
        heads, quality = read_json(self.heads_file), read_json(self.quality_file)
        summary = {key: heads[key] for key in heads if key not in DETAILS}
        summary["indexer"] = {
            "made": f"closed form and {quality['steps']} gradient steps",
            "heads": [
                {key: line[key] for key in line if key != "curve"} for line in quality["heads"]
            ],
        }
        if distilled:
            report = read_json(self.path / REPORT_FILE)
            summary["distil"] = {key: report[key] for key in DISTIL_FACTS}
        return summary


def _described(checkpoint: Checkpoint, options: ConvertOptions) -> dict[str, Any]:
    """The model by its content and the options, comparable as JSON."""
    settings = asdict(options)
    for name, path in (("data", options.data), ("heads", options.heads)):
        settings[name] = None if path is None else str(path)
    settings["needle_lengths"] = list(options.needle_lengths)
    for name in ("device", "distil"):  # may change between two tries; distil checks its own
        del settings[name]
    return {
        "model": checkpoint.folder.resolve().name,
        "model_sha256": model_digest(checkpoint),
        "options": settings,
    }
