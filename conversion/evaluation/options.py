"""What to evaluate, frozen; and the names of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conversion.errors import ConversionError
from conversion.evaluation.code_tasks import CODE_TASKS
from conversion.evaluation.ruler.tasks import RULER_TASKS
from conversion.evaluation.traces import TRACE_TASKS
from engine.model.attention_layers import PrefillMode
from engine.model.kv_bytes import IndexDtype

AttentionName = Literal["dense", "sparse"]
GRID_TASKS = ("passkey", "code_passkey")
TEXT_TASK = "text"  # loss by position, KL and top-1 agreement
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": RULER_TASKS,
    "code": CODE_TASKS,
    "trace": TRACE_TASKS,
    "grid": GRID_TASKS,
}
TASKS = (*RULER_TASKS, "kv", *GRID_TASKS, *CODE_TASKS, *TRACE_TASKS, TEXT_TASK)
NEEDS_LOGITS = frozenset({*TRACE_TASKS, TEXT_TASK})


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What to measure and how. Lengths are in tokens."""

    tasks: tuple[str, ...] = ("code", "code_passkey", "trace", "text")  # tasks or groups of them
    lengths: tuple[int, ...] = (4096, 8192, 16384)  # prompt and answer together
    samples: int = 20  # documents or prompts per task, length and setting
    attention: tuple[AttentionName, ...] = ()  # empty: dense, and sparse if the model is
    prefill_attention: PrefillMode = "dense"  # of the sparse model's retrieval heads
    index_dtype: IndexDtype = "auto"  # of the sparse model's index keys; auto: as dtype
    teacher: Path | None = None  # dense model to compare with instead of the model itself
    facts: tuple[int, ...] = (1, 4, 16)  # planted facts of a document; each is asked
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the passkey grid
    text_samples: int = 8  # documents of the task "text"
    decoded: int = 512  # of their tokens run under the decode rule
    haystack: Path | None = None  # prose; None: docstrings of the Python standard library
    data: Path | None = None  # text of code and text tasks; None: Python sources
    urls: tuple[str, ...] = ()  # servers instead of the model in process: URL or NAME=URL
    url_model: str | None = None  # model name for them; None: the first that each lists
    api_key: str | None = None
    concurrency: int = 8  # requests at once
    timeout: float = 600.0  # seconds of one request
    seed: int = 0  # of documents and facts; RULER's own seed is fixed
    device: str = "cpu"  # cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA

    def __post_init__(self) -> None:
        selected = self.selected()
        _at_least(1, samples=self.samples, text_samples=self.text_samples, decoded=self.decoded)
        _at_least(1, concurrency=self.concurrency)
        if not self.timeout > 0:
            raise ConversionError(f"timeout must be above 0, got {self.timeout:g}")
        if self.url_model is not None and not self.urls:
            raise ConversionError("url_model is for urls, and none is given")
        if not self.lengths or min(self.lengths) < 1:
            raise ConversionError("lengths must be positive")
        if not self.facts or min(self.facts) < 1:
            raise ConversionError("facts must be positive")
        if max(self.facts) > 24 and "code_frequent" in selected:
            raise ConversionError("facts must be at most 24 for code_frequent")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConversionError("depths must be from 0 to 1")
        if TEXT_TASK in selected and self.decoded >= min(self.lengths):
            raise ConversionError("decoded must be less than every length")
        if len(set(self.attention)) < len(self.attention):
            raise ConversionError("attention: the same one is named twice")
        if self.urls:
            self._check_urls(selected)

    def selected(self) -> tuple[str, ...]:
        """Single tasks, groups resolved, each once.

        Raises:
            ConversionError: a task is unknown, or there is none.
        """
        found: dict[str, None] = {}
        for name in self.tasks:
            if name not in GROUPS and name not in TASKS:
                known = ", ".join([*GROUPS, *TASKS])
                raise ConversionError(f"unknown task {name!r}; known: {known}")
            found |= dict.fromkeys(GROUPS.get(name, (name,)))
        if not found:
            raise ConversionError("tasks: none is given")
        return tuple(found)

    def _check_urls(self, selected: Sequence[str]) -> None:
        if self.attention or self.teacher is not None:
            raise ConversionError("attention and teacher belong to a model in process, not to urls")
        for task in selected:
            if task in NEEDS_LOGITS:
                raise ConversionError(f"{task} needs the model in process, a server has no logits")
        names = [name for name, _ in self.named_urls()]
        if len(set(names)) < len(names):
            raise ConversionError("urls: the same name twice; give NAME=URL")

    def named_urls(self) -> list[tuple[str, str]]:
        """Names and addresses of the servers."""
        pairs = []
        for url in self.urls:
            name, found, address = url.partition("=")
            named = found and "/" not in name
            pairs.append((name, address) if named else (url, url))
        return pairs


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConversionError(f"{name} must be at least {least}, got {value}")
