"""A subject that is asked only once: what it scored on the same samples before is read from disk.

Many variants are compared with one dense model, in several runs if one is stopped. Its scores are
kept by document, so that differences stay paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conversion.errors import ConversionError
from conversion.evaluation.in_process import InProcess
from conversion.evaluation.samples import Sample
from conversion.evaluation.teacher_forced import Variant
from conversion.evaluation.traces import Trace
from conversion.state import read_json, write_json

Advance = Callable[[], None]


class ScoreMemory:
    """Scores by samples in one file, of one model: those of another one are forgotten."""

    def __init__(self, path: Path, model: str) -> None:
        """
        Args:
            model: names the weights, and everything else that scores depend on.

        Raises:
            ConversionError: the file is there and not readable.
        """
        self._path = path
        self._model = model
        self._scores: dict[str, list[Any]] = {}
        found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            raise ConversionError(f"{path}: no scores; remove it")
        if found.get("model") == model:
            self._scores = found["scores"]

    def get(self, samples: Sequence[object]) -> list[Any] | None:
        """What was kept for exactly these samples."""
        return self._scores.get(_digest(samples))

    def keep(self, samples: Sequence[object], scores: Sequence[Any]) -> None:
        """Write at once; raises ConversionError."""
        self._scores[_digest(samples)] = list(scores)
        write_json(self._path, {"model": self._model, "scores": self._scores})


class Remembered:
    """A variant that does not select, in front of its memory."""

    def __init__(self, subject: InProcess, memory: ScoreMemory) -> None:
        assert not subject.variant.selects  # what it attends is not kept
        self.name = subject.name
        self.attended_fraction: float | None = None
        self._subject = subject
        self._memory = memory

    @property
    def variant(self) -> Variant:
        return self._subject.variant

    def scores(self, samples: Sequence[Sample], advance: Advance) -> list[tuple[float, ...]]:
        """As `InProcess.scores`."""
        found = self._memory.get(samples)
        if found is None:
            found = self._subject.scores(samples, advance)
            self._memory.keep(samples, found)
        else:
            _skip(samples, advance)
        return [tuple(own) for own in found]

    def right_steps(self, traces: Sequence[Trace], advance: Advance) -> list[list[bool]]:
        """As `InProcess.right_steps`."""
        found = self._memory.get(traces)
        if found is None:
            found = self._subject.right_steps(traces, advance)
            self._memory.keep(traces, found)
        else:
            _skip(traces, advance)
        return found


def _skip(samples: Sequence[object], advance: Advance) -> None:
    for _ in samples:
        advance()


def _digest(samples: Sequence[object]) -> str:
    """Samples are plain data: equal ones look the same."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode())
    return digest.hexdigest()
