"""Everything that a report shows: report.json is this, the page and the plots are made of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from conversion.evaluation.report import EvalReport
from conversion.report.ablation_lines import AblationLine, ablation_lines
from conversion.report.attended import AttendedPoint, attended_points
from conversion.report.evaluation_file import Ablations
from conversion.report.facts import DistilFacts, HeadScores, IndexerFacts, ModelFacts
from conversion.report.grouping import grouped
from conversion.report.sources import REPORT_VERSION, Sources

PACKAGES = (
    "rtpurbo",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
)


@dataclass(frozen=True, slots=True)
class Contents:
    """Facts of one converted model. None or empty: not measured."""

    model: ModelFacts
    versions: Mapping[str, str]  # that made the report
    converted_with: Mapping[str, str] | None
    options: Mapping[str, Any] | None  # of the conversion
    heads: HeadScores | None
    indexer: IndexerFacts | None
    distil: DistilFacts | None
    evaluations: tuple[EvalReport, ...]
    ablations: Ablations

    @classmethod
    def gather(
        cls,
        sources: Sources,
        evaluations: Sequence[EvalReport],
        ablations: Ablations | None,
        *,
        converting: bool = False,
    ) -> Contents:
        """What is given takes the place of the same part of the earlier report.

        Args:
            evaluations: none: those of the earlier report.
            converting: the conversion itself makes the report, with the same versions.

        Raises:
            ConversionError: a file of the state is unusable.
        """
        earlier, versions = sources.earlier, installed_versions()
        return cls(
            model=sources.model(),
            versions=versions,
            converted_with=versions if converting else earlier.converted_with,
            options=sources.options(),
            heads=sources.heads(),
            indexer=sources.indexer(),
            distil=sources.distil(),
            evaluations=tuple(evaluations) or earlier.evaluations,
            ablations=earlier.ablations if ablations is None else ablations,
        )

    def groups(self) -> list[EvalReport]:
        """Evaluations as they are shown."""
        return grouped(self.evaluations)

    def attended(self) -> list[list[AttendedPoint]]:
        """Per group."""
        return [attended_points(report) for report in self.groups()]

    def ablation_lines(self) -> list[AblationLine]:
        return ablation_lines(self.ablations)

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dumps: what was measured and what the page derives from it."""
        indexer = None if self.indexer is None else asdict(self.indexer)
        if indexer is not None and self.indexer is not None:
            indexer["means"] = _means(self.indexer)
        return {
            "report_version": REPORT_VERSION,
            "versions": dict(self.versions),
            "converted_with": self.converted_with,
            "seed": None if self.options is None else self.options.get("seed"),
            "options": self.options,
            "model": {
                **asdict(self.model),
                "kept_heads": self.model.kept,
                "kept_kv_heads": self.model.kept_kv,
            },
            "heads": None if self.heads is None else asdict(self.heads),
            "indexer": indexer,
            "distil": None if self.distil is None else asdict(self.distil),
            "evaluations": [report.as_dict() for report in self.evaluations],
            "attended": [[asdict(point) for point in group] for group in self.attended()],
            "ablations": self.ablations.as_dict(),
            "ablation_lines": [asdict(line) for line in self.ablation_lines()],
        }


def installed_versions() -> dict[str, str]:
    """Of Python and the packages that a result may depend on, those that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _means(indexer: IndexerFacts) -> dict[str, Any]:
    """Over the heads."""
    return {
        queries: {
            "trained": asdict(indexer.mean(queries)),
            "closed_form": asdict(indexer.mean(queries, closed_form=True)),
            "curve": [
                {"top_p": top_p, **asdict(quality)}
                for top_p, quality in indexer.mean_curve(queries)
            ],
        }
        for queries in ("anywhere", "answers")
    }
