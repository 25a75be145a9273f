"""The dense teacher's most likely tokens at every response position, computed once, kept on disk.

One safetensors file per sequence, whole or not there:

    ids          int32 [n]      the sequence
    top_ids      int32 [R, k]   the teacher's k most likely tokens, most likely first
    top_logits   float32 [R, k]

Row r predicts response token r: it is what the teacher says after token n - R - 1 + r. Training
reads nothing else, so the text is read and tokenised once.

Shapes: n tokens of a sequence, R response tokens, k tokens kept, Z sequences of a batch, V
vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from conversion.distil_data import Sample
from conversion.errors import ConversionError
from conversion.micro_batches import Shape, micro_batches
from conversion.parallel import Ranks
from conversion.state import read_json, write_json
from conversion.student import Student
from conversion.student_attention import StudentAttention
from conversion.student_layers import StudentLayers
from engine.errors import CheckpointError
from engine.model.safetensors_header import read_header

KEPT = 10  # the paper's
INFO = "teacher.json"  # written last: the cache is complete


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """Sequences of one shape with what the teacher says."""

    ids_Zn: Tensor  # int64
    top_ids_ZRk: Tensor  # int64
    top_logits_ZRk: Tensor  # float32


def top_kl(teacher_ZRk: Tensor, student_ZRk: Tensor) -> Tensor:
    """KL(teacher || student) over the same k tokens, nats per row, [Z, R].

    Both are logits and are normalised over these tokens alone (arXiv 2605.16928).
    """
    teacher = teacher_ZRk.log_softmax(-1)
    return kl_div(student_ZRk.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)


class TeacherCache:
    """A folder of such files, numbered from 0."""

    def __init__(self, folder: Path, described: Any, ranks: Ranks) -> None:
        """Open the folder, emptied first if what it holds was described differently.

        Raises:
            ConversionError: it cannot be made or emptied.
        """
        self.folder = folder
        self._described = described
        self._ranks = ranks
        if ranks.is_first:
            self._open()
        ranks.wait()

    @property
    def is_complete(self) -> bool:
        return bool(self._ranks.agreed((self.folder / INFO).exists()))

    def shapes(self) -> dict[int, Shape]:
        """Of every sequence of a complete cache; raises ConversionError."""
        count = int(read_json(self.folder / INFO)["sequences"])
        return {number: self._shape(number) for number in range(count)}

    def batch(self, numbers: tuple[int, ...]) -> TeacherBatch:
        """Sequences of one shape, on the device; raises ConversionError."""
        files = [self._load(number) for number in numbers]
        stacked = {name: torch.stack([file[name] for file in files]) for name in files[0]}
        device = self._ranks.device
        return TeacherBatch(
            ids_Zn=stacked["ids"].to(device, torch.int64),
            top_ids_ZRk=stacked["top_ids"].to(device, torch.int64),
            top_logits_ZRk=stacked["top_logits"].to(device),
        )

    def fill(
        self, student: Student, samples: Iterator[Sample], micro_tokens: int, limit: int
    ) -> Iterator[int]:
        """Compute what is missing of the first `limit` samples; yields how many are done so far.

        Args:
            student: not trained yet, and so the teacher.
            samples: the same ones in the same order whenever the cache is filled.

        Raises:
            ConversionError: a file cannot be written; no sample.
        """
        config = student.config
        layers = StudentLayers(config, [None] * config.num_layers, student.device, student.dtype)
        done = 0
        world = self._ranks.world
        numbered = enumerate(islice(samples, limit))
        # Large enough that every process has a full batch of the longest sequences.
        while chunk := list(islice(numbered, world * 8)):
            done += len(chunk)
            present = {number for number, _ in chunk if self._path(number).exists()}
            present = self._ranks.agreed(present)
            missing = [(number, sample) for number, sample in chunk if number not in present]
            if missing:
                self._compute(student, layers, dict(missing), micro_tokens)
            yield done
        if not done:
            raise ConversionError("there is no text for a single sequence of this length")
        self._ranks.wait()
        if self._ranks.is_first:
            write_json(self.folder / INFO, {"sequences": done, "of": self._described})
        self._ranks.wait()

    @torch.no_grad()
    def _compute(
        self, student: Student, layers: StudentLayers, samples: dict[int, Sample], micro_tokens: int
    ) -> None:
        ranks = self._ranks
        shapes = {number: Shape(len(s.ids), s.response) for number, s in samples.items()}
        numbers = list(samples)
        # A process without a sample of its own repeats one.
        numbers += [numbers[-1]] * max(0, ranks.world - len(numbers))
        for micro in micro_batches(numbers, shapes, ranks.rank, ranks.world, micro_tokens):
            ids_Zn = torch.tensor([samples[n].ids for n in micro.numbers], device=ranks.device)
            tokens, response = micro.shape
            attention = StudentAttention(layers, len(ids_Zn), tokens - response)
            logits_ZRV = student.model(ids_Zn[:, :-1], response, attention)
            top = logits_ZRV.topk(min(KEPT, logits_ZRV.shape[-1]), dim=-1)
            for place, number in enumerate(micro.numbers):
                if micro.counts and numbers.index(number) % ranks.world == ranks.rank:
                    self._save(number, ids_Zn[place], top.indices[place], top.values[place])

    def _save(self, number: int, ids_n: Tensor, top_ids_Rk: Tensor, top_logits_Rk: Tensor) -> None:
        path = self._path(number)
        part = path.with_name(path.name + ".part")
        tensors = {"ids": ids_n.int(), "top_ids": top_ids_Rk.int(), "top_logits": top_logits_Rk}
        try:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, part)
            os.replace(part, path)
        except Exception as error:  # no room on disk comes as the library's own type
            raise ConversionError(f"{path}: cannot be written ({error})".splitlines()[0]) from None

    def _load(self, number: int) -> dict[str, Tensor]:
        path = self._path(number)
        try:
            return load_file(path)
        except Exception:  # the library raises its own types
            raise self._unreadable(path) from None

    def _shape(self, number: int) -> Shape:
        path = self._path(number)
        try:
            header = read_header(path)
            return Shape(header["ids"].shape[0], header["top_ids"].shape[0])
        except (CheckpointError, KeyError):
            raise self._unreadable(path) from None

    def _unreadable(self, path: Path) -> ConversionError:
        return ConversionError(f"{path}: not readable; remove {self.folder} to compute it again")

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _open(self) -> None:
        """Make the folder; `begun.json` tells what its files are of while it is being filled."""
        begun = self.folder / "begun.json"
        try:
            if self.folder.exists() and not (
                begun.exists() and read_json(begun) == self._described
            ):
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConversionError(f"{self.folder}: cannot be made ({error.strerror})") from None
        if not begun.exists():
            write_json(begun, self._described)
