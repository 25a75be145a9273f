"""A converted tiny model, some text, and settings that train in a second or two."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conversion.distil import distil
from conversion.distil_options import DistilOptions
from conversion.distillation import Distillation
from conversion.text_source import TextSource, load_tokenizer
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.weights import load_decoder
from tests.engine.model.tiny_models import make_checkpoint

SECTION = {
    "retrieval_heads": [[], [1], [2, 4]],
    "window_tokens": 32,
    "index_dim": 4,
    "index_age_bias": True,
    "block_tokens": 8,
    "top_p": 0.7,
}
OPTIONS = DistilOptions(
    sequence_tokens=128,
    response_tokens=20,
    sequences=24,
    validation_sequences=5,
    steps=6,
    batch=4,
    learning_rate=1e-3,
    warmup_steps=2,
    validate_every=2,
    micro_tokens=256,
)


class KilledError(Exception):
    """The process ends here."""


@dataclass(frozen=True)
class TinyDistillation:
    """A folder with a model and text; every run has a work folder of its own."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, family: str = "qwen3", **overrides: Any) -> TinyDistillation:
        make_checkpoint(family, folder / "model", section=SECTION, **overrides)
        (folder / "text").mkdir()
        for i in range(30):
            lines = (f"def f{i}_{j}(x):\n    return x * {i * j} + {j}\n" for j in range(60))
            (folder / "text" / f"{i:02}.py").write_text("".join(lines))
        return cls(folder)

    @property
    def checkpoint(self) -> Checkpoint:
        """With its sparse section; stage 2 takes the head roles as an argument of its own."""
        return preflight(self.folder / "model")

    def run(self, work: str, **changes: Any) -> tuple[dict[str, Any], str]:
        """distil.json and what was printed."""
        checkpoint = self.checkpoint
        assert checkpoint.config.sparse is not None
        (self.folder / work).mkdir(exist_ok=True)
        console = Console(file=io.StringIO(), width=200)
        report = distil(
            checkpoint,
            checkpoint.config.sparse,
            load_decoder(checkpoint, "cpu", torch.float32).indexers,
            load_tokenizer(checkpoint.folder),
            TextSource.find(self.folder / "text"),
            self.folder / work,
            replace(OPTIONS, **changes),
            console,
        )
        assert isinstance(console.file, io.StringIO)
        return report, console.file.getvalue()

    def weights(self, work: str) -> bytes:
        """What a run has made."""
        return (self.folder / work / "student.safetensors").read_bytes()


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies inside this step, or in the validation after it."""
    run = Distillation.step

    def dying(self: Distillation, number: int, steps: int) -> float:
        if number == step:
            raise KilledError
        return run(self, number, steps)

    monkeypatch.setattr(Distillation, "step", dying)
