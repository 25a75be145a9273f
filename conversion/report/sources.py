"""Where the facts come from: the folder, the state of its conversion, the report that is there.

config.json holds the means, the state the details of them. A conversion's state may be gone, or
be of another conversion by now, so a part of it is used only where it says what config.json says;
then the earlier report has the details. What `rtpurbo report` is not given anew is kept as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from conversion.errors import ConversionError
from conversion.evaluation.report import EvalReport
from conversion.head_roles import Scores
from conversion.report.evaluation_file import (
    Ablations,
    parse_ablations,
    parse_evaluation,
    read_value,
    validated,
)
from conversion.report.facts import DistilFacts, HeadScores, IndexerFacts, ModelFacts
from conversion.state import model_digest, read_json
from engine.model.checkpoint import Checkpoint, preflight

REPORT_FOLDER, REPORT_FILE, REPORT_VERSION = "report", "report.json", 1
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Earlier:
    """The parts of a report.json that outlive the state of the conversion."""

    source: str | None = None
    source_sha256: str | None = None
    converted_with: Mapping[str, str] | None = None
    options: Mapping[str, Any] | None = None
    heads: HeadScores | None = None
    indexer: IndexerFacts | None = None
    distil: DistilFacts | None = None
    evaluations: tuple[EvalReport, ...] = ()
    ablations: Ablations = field(default_factory=Ablations)


@dataclass(frozen=True, slots=True)
class ConversionRun:
    """run.json of the state."""

    model: str  # name of the folder that was converted
    model_sha256: str
    options: Mapping[str, Any]


class Sources:
    """Facts of one converted folder."""

    def __init__(self, out: Path, tell: Callable[[str], None]) -> None:
        """
        Args:
            tell: takes a line for the operator about what is not used.

        Raises:
            CheckpointError: the folder is unusable; one line that names the file.
            ConversionError: it is a dense model.
        """
        self._checkpoint: Checkpoint = preflight(out)
        if self._checkpoint.config.sparse is None:
            raise ConversionError(f"{out}: a dense model; convert it first (rtpurbo convert)")
        self._work = out.with_name(out.name + ".work")
        self._tell = tell
        self._digest = model_digest(self._checkpoint)
        self._section = self._calibration()
        self._earlier = self._read_earlier(out / REPORT_FOLDER / REPORT_FILE)
        self._run: ConversionRun | None = None
        if self._is_of_state():
            self._run = self._checked(ConversionRun, self._state("run.json"), "run.json")

    @property
    def earlier(self) -> Earlier:
        """Empty if there is no report of this very model."""
        return self._earlier

    def model(self) -> ModelFacts:
        source, digest = self._earlier.source, self._earlier.source_sha256
        if self._run is not None:
            source, digest = self._run.model, self._run.model_sha256
        return ModelFacts.of(self._checkpoint, self._digest, source, digest)

    def options(self) -> Mapping[str, Any] | None:
        """Of the conversion."""
        return self._earlier.options if self._run is None else self._run.options

    def heads(self) -> HeadScores | None:
        """Needle scores."""
        own = self._tolerated(HeadScores, self._section)
        if own is None or not self._is_by_head(own.scores):
            return self._earlier.heads
        if self._run is not None:
            content = self._state("heads.json")
            return self._checked(HeadScores, content, "heads.json")
        return self._earlier.heads or own

    def indexer(self) -> IndexerFacts | None:
        """The fit and its quality."""
        content = self._section.get("indexer")
        own = self._tolerated(IndexerFacts, content)
        if own is None or not own.heads:
            return self._earlier.indexer
        quality = self._state("quality.json") if self._run is not None else None
        if quality is not None and self._agrees(quality, content):
            return self._checked(IndexerFacts, {**quality, "made": own.made}, "quality.json")
        return self._earlier.indexer or own

    def distil(self) -> DistilFacts | None:
        """Stage 2; None if it was not run."""
        content = self._section.get("distil")
        own = self._tolerated(DistilFacts, content)
        if own is None or not isinstance(content, dict):
            return None
        report = self._state("distil.json") if self._run is not None else None
        if isinstance(report, dict) and content.items() <= report.items():
            described = report.get("of")
            options = described.get("options") if isinstance(described, dict) else None
            return self._checked(DistilFacts, {**report, "options": options}, "distil.json")
        return self._earlier.distil or own

    def _calibration(self) -> dict[str, Any]:
        """Free-form in the format: what is not of our form is not used."""
        config = json.loads((self._checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("rtpurbo", {}).get("calibration")
        return found if isinstance(found, dict) else {}

    def _is_of_state(self) -> bool:
        """Whether OUT.work is there and made this folder."""
        if not (self._work / "run.json").exists():
            return False
        heads = self._state("heads.json")
        same = isinstance(heads, dict) and heads.get("scores") == self._section.get("scores")
        if not same:
            self._tell(f"{self._work} is the state of another conversion: not used")
        return same

    def _state(self, name: str) -> Any:
        """A state file, None if it is not there; raises ConversionError."""
        path = self._work / name
        return read_json(path) if path.exists() else None

    def _agrees(self, quality: Any, section: Any) -> bool:
        """Whether the qualities are those that were exported, curves left aside."""
        if not isinstance(quality, dict) or not isinstance(quality.get("heads"), list):
            return False
        heads = [{**head, "curve": None} for head in quality["heads"] if isinstance(head, dict)]
        return heads == [{**head, "curve": None} for head in section["heads"]]

    def _is_by_head(self, scores: Scores) -> bool:
        config = self._checkpoint.config
        return len(scores) == config.num_layers and all(
            len(layer) == config.num_heads and all(map(math.isfinite, layer)) for layer in scores
        )

    def _read_earlier(self, path: Path) -> Earlier:
        if not path.exists():
            return Earlier()
        value = read_value(path)
        model = value.get("model") if isinstance(value, dict) else None
        if not isinstance(model, dict) or value.get("report_version") != REPORT_VERSION:
            raise ConversionError(f"{path}: not a report of this version; remove {path.parent}")
        if model.get("sha256") != self._digest:
            self._tell(f"{path} is of another model: not used")
            return Earlier()
        evaluations = validated(list[Any], value.get("evaluations"), str(path))
        return Earlier(
            source=validated(str | None, model.get("source"), str(path)),
            source_sha256=validated(str | None, model.get("source_sha256"), str(path)),
            converted_with=validated(dict[str, str] | None, value.get("converted_with"), str(path)),
            options=validated(dict[str, Any] | None, value.get("options"), str(path)),
            heads=validated(HeadScores | None, value.get("heads"), str(path)),
            indexer=validated(IndexerFacts | None, value.get("indexer"), str(path)),
            distil=validated(DistilFacts | None, value.get("distil"), str(path)),
            evaluations=tuple(parse_evaluation(own, str(path)) for own in evaluations),
            ablations=parse_ablations(value.get("ablations"), str(path)),
        )

    def _checked(self, kind: type[Part], value: Any, name: str) -> Part:
        found: Part = validated(kind, value, str(self._work / name))
        return found

    @staticmethod
    def _tolerated(kind: type[Part], value: Any) -> Part | None:
        try:
            found: Part = validated(kind, value, "")
        except ConversionError:
            return None
        return found
