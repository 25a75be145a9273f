"""`rtpurbo ablate MODEL OUT.json`: what each part of a converted model is worth, on one set of
samples.

OUT.json holds one report for each variant, written as soon as it is measured:

    {"variants": {NAME: {"description": ..., "report": EvalReport.as_dict()}},
     "skipped": {NAME: why}}

In every report "sparse" is the variant and "dense" the same reference. The reference answers only
once: its scores by document are kept in OUT.dense.json. (Text is read by both side by side: their
distributions are compared and not kept.) A run that was stopped goes on; reports of another model
or other settings are measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from conversion.errors import ConversionError
from conversion.evaluation.ablation_model import AblationModel
from conversion.evaluation.ablation_plan import SHIPPED, Ablation, AblationPlan
from conversion.evaluation.block_budget import CountedSelection, FixedBlocks
from conversion.evaluation.in_process import InProcess
from conversion.evaluation.kv_cost import kv_bytes_per_token
from conversion.evaluation.options import EvalOptions
from conversion.evaluation.remembered import Remembered, ScoreMemory
from conversion.evaluation.report import EvalReport, joined_reports
from conversion.evaluation.run import EvalRun, LocalSubject, settings_of
from conversion.evaluation.sample_maker import SampleMaker
from conversion.evaluation.teacher_forced import Variant
from conversion.evaluation.variants import dense_variant, refuse_length
from conversion.state import read_json, write_json

BLOCKS = "blocks_per_head"  # of the settings of a report: means while it was measured
Blocks = dict[str, dict[str, list[list[float]]]]  # by length, task, layer and retrieval head


def ablate(
    model: Path, out: Path, options: EvalOptions, work: Path | None, console: Console
) -> dict[str, Any]:
    """Measure every variant of a converted folder that OUT.json does not have yet.

    Args:
        options: samples, device and dtype. `teacher`, the folder that was converted, is the
            reference; without it the model's own weights with full attention are.
        work: state of the conversion; None: MODEL.work if it is there.
        console: shows progress; the results are the caller's to print.

    Returns:
        What OUT.json holds.

    Raises:
        CheckpointError: a model folder is unusable; one line that names the file.
        ConversionError: options, texts, state or OUT.json are unusable; one line.
    """
    if options.urls or options.attention:
        raise ConversionError(
            "ablations are of a model in process, with dense and sparse attention"
        )
    run = AblationRun(AblationModel(model, options, work, console), out, options, console)
    run.measure()
    return run.content


class AblationRun:
    """All variants of one model, and what has been found so far."""

    def __init__(
        self, model: AblationModel, out: Path, options: EvalOptions, console: Console
    ) -> None:
        refuse_length(options, model.config)
        self._model = model
        self._out = out
        self._options = options
        self._console = console
        self._plan = AblationPlan(model, options.seed)
        self._maker = SampleMaker(model.tokenizer, options, keep=True)
        self._notes = (*self._maker.prepare(), *self._without_selection())
        self.content: dict[str, Any] = {"variants": {}, "skipped": self._plan.skipped}
        self._read()
        reference = f"{model.identity} {options.device} {options.dtype}"
        memory = ScoreMemory(out.with_suffix(".dense.json"), reference)
        dense = InProcess("dense", dense_variant(model.teacher or model.decoder), model.tokenizer)
        self._dense = Remembered(dense, memory)

    def measure(self) -> None:
        """Every variant of the plan, in its order."""
        for name, reason in self._plan.skipped.items():
            self._console.print(f"{name}: left out, {reason}", highlight=False)
        todo = [own for own in self._plan.ablations if own.name not in self.content["variants"]]
        done = len(self._plan.ablations) - len(todo)
        started = time.monotonic()
        for number, ablation in enumerate(todo):
            left = (time.monotonic() - started) / number * (len(todo) - number) if number else None
            place = f"{done + number + 1}/{len(self._plan.ablations)} {ablation.name}"
            self._console.print(place + _in_words(left), highlight=False)
            self._keep(ablation, self._report(ablation))

    def _report(self, ablation: Ablation) -> EvalReport:
        """One variant beside the reference, at every length."""
        started = time.monotonic()
        variant = ablation.build()
        blocks: Blocks = {}
        reports = []
        for length, task in product(self._options.lengths, self._options.selected()):
            selections = self._selections(ablation, length, task)
            reports.append(self._part(replace(variant, selections=selections), length, task))
            counted = [own for own in selections if isinstance(own, CountedSelection)]
            if counted:
                blocks.setdefault(str(length), {})[task] = [own.means() for own in counted]
        settings = {**self._settings(ablation), **({BLOCKS: blocks} if blocks else {})}
        seconds = round(time.monotonic() - started, 1)
        return replace(joined_reports(reports), settings=settings, seconds=seconds)

    def _part(self, variant: Variant, length: int, task: str) -> EvalReport:
        subjects: list[LocalSubject] = [
            self._dense,
            InProcess("sparse", variant, self._model.tokenizer),
        ]
        run = EvalRun(
            replace(self._options, lengths=(length,), tasks=(task,)),
            self._maker,
            subjects,
            subjects,
            self._console,
            window=self._model.sparse.window_tokens,
        )
        return run.measure(self._model.folder.resolve().name, self._notes)

    def _without_selection(self) -> tuple[str, ...]:
        """Lengths at which no rule of selection can make a difference, in words."""
        below = self._model.sparse.dense_below
        return tuple(
            f"length {length}: retrieval heads attend everything below {below} tokens (dense_below)"
            for length in self._options.lengths
            if length <= below
        )

    def _selections(
        self, ablation: Ablation, length: int, task: str
    ) -> Sequence[CountedSelection | FixedBlocks]:
        """Per layer: the rule that serves, counted, or the fixed numbers that it came to."""
        if not ablation.fixed_blocks:
            return [CountedSelection() for _ in range(self._model.config.num_layers)]
        # What the model has taken as converted, which comes first in the plan.
        taken: Blocks = self.content["variants"][SHIPPED]["report"]["settings"][BLOCKS]
        return [FixedBlocks(means or [1.0]) for means in taken[str(length)][task]]

    def _settings(self, ablation: Ablation) -> dict[str, Any]:
        """What a report depends on, as JSON."""
        assert ablation.config.sparse is not None
        found = {
            **settings_of(self._options),
            "model_sha256": self._model.identity,
            "description": ablation.description,
            "sparse": asdict(ablation.config.sparse),
            "fit": asdict(self._model.fit_texts),
            "kv_bytes_per_token": self._kv_bytes(ablation),
        }
        plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
        return plain

    def _kv_bytes(self, ablation: Ablation) -> dict[str, dict[str, int]]:
        """By length and variant, in bfloat16."""
        dense = replace(ablation.config, sparse=None)
        return {
            str(length): {
                "dense": kv_bytes_per_token(dense, length),
                "sparse": kv_bytes_per_token(ablation.config, length),
            }
            for length in self._options.lengths
        }

    def _read(self) -> None:
        """Take over what an earlier run has measured with the same settings."""
        found = read_json(self._out) if self._out.exists() else {"variants": {}}
        if not isinstance(found, dict) or not isinstance(found.get("variants"), dict):
            raise ConversionError(f"{self._out}: not a file of ablations; name another one")
        for ablation in self._plan.ablations:
            old = found["variants"].get(ablation.name)
            if old is not None and self._is_of(old, ablation):
                self.content["variants"][ablation.name] = old
        if SHIPPED not in self.content["variants"]:
            self.content["variants"].pop("top-k", None)  # its budget is measured anew
        anew = set(found["variants"]) - set(self.content["variants"])
        if anew:
            self._console.print(f"of another model or other settings: {', '.join(sorted(anew))}")
        self._write()

    def _is_of(self, old: Mapping[str, Any], ablation: Ablation) -> bool:
        settings = dict(old["report"]["settings"])
        settings.pop(BLOCKS, None)
        return bool(settings == self._settings(ablation))

    def _keep(self, ablation: Ablation, report: EvalReport) -> None:
        self.content["variants"][ablation.name] = json.loads(
            json.dumps({"description": ablation.description, "report": report.as_dict()})
        )
        order = [own.name for own in self._plan.ablations]
        kept = self.content["variants"]
        self.content["variants"] = {name: kept[name] for name in order if name in kept}
        self._write()

    def _write(self) -> None:
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"{self._out}: cannot be made ({error.strerror})") from None
        write_json(self._out, self.content)


def _in_words(seconds: float | None) -> str:
    return "" if seconds is None else f", about {max(1, round(seconds / 60))} min left"
