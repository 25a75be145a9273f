"""Two processes on gloo make the model that one process makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from conversion.errors import ConversionError
from conversion.parallel import Ranks, gathered, joined, own_part
from conversion.student import Student
from conversion.training_state import TrainingState
from engine.model.weights import load_decoder, stored_tensors
from tests.conversion.tiny_distillation import TinyDistillation
from tests.conversion.two_processes import WORLD, in_two_processes


class KilledError(Exception):
    """The processes end here."""


def exchange(rank: int, folder: Path) -> None:
    """What processes tell each other, and how they hold one model."""
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.is_first) == (rank, WORLD, rank == 0)
        assert ranks.total([1.0, rank]) == [2.0, 1.0]
        assert ranks.agreed({"from": rank}) == {"from": 0}
        ranks.wait()
        check_shares(TinyDistillation(folder), ranks)
    assert dist.is_initialized()  # it was there before, and stays


def check_shares(tiny: TinyDistillation, ranks: Ranks) -> None:
    student = Student(tiny.checkpoint, ranks, torch.float32, recompute=True)
    expected = load_decoder(tiny.checkpoint, "cpu", torch.float32)
    held = 0
    for name, parameter in student.parameters.items():
        assert isinstance(parameter, DTensor)
        assert torch.equal(gathered(parameter), expected.get_parameter(name))
        held += own_part(parameter).numel()
    total = sum(parameter.numel() for parameter in expected.parameters())
    assert abs(held - total / WORLD) < 0.02 * total
    pairs = zip(student.stored(), stored_tensors(expected), strict=True)
    for (name, found), (wanted, tensor) in pairs:
        assert name == wanted
        assert torch.equal(found, tensor)


def distil_together(rank: int, folder: Path, models: list[str]) -> None:
    for model in models:
        distil_in_two_goes(TinyDistillation(folder / model), rank)


def distil_in_two_goes(tiny: TinyDistillation, rank: int) -> None:
    """Half way, then to the end, with the teacher asked again between."""
    save = TrainingState.save

    def dying(self: TrainingState, *args: Any) -> None:
        save(self, *args)
        if args[0].step == 2:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "save", dying)
        with pytest.raises(KilledError):
            tiny.run("together")
    if rank == 0:
        shutil.rmtree(tiny.folder / "together" / "teacher")
    dist.barrier()
    report, printed = tiny.run("together")
    assert bool(printed) == (rank == 0)
    assert report["stopped"] == "all 6 steps are done"
    with pytest.raises(ConversionError, match="batch 3 must be a multiple of 2"):
        tiny.run("odd", batch=3)


MODELS: dict[str, dict[str, Any]] = {
    "tied": {"family": "qwen3", "tie_word_embeddings": True},
    "moe": {"family": "qwen3_moe"},
}


def test_processes_exchange_values_and_share_a_model(tmp_path: Path) -> None:
    TinyDistillation.make(tmp_path, "qwen3_moe")
    in_two_processes(exchange, tmp_path)


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    alone = {}
    for name, model in MODELS.items():
        (tmp_path / name).mkdir()
        alone[name], _ = TinyDistillation.make(tmp_path / name, **model).run("alone")

    in_two_processes(distil_together, tmp_path, list(MODELS))

    for name, report in alone.items():
        compare(tmp_path / name, report)


def compare(folder: Path, alone: dict[str, Any]) -> None:
    together = json.loads((folder / "together" / "distil.json").read_text())
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    for one, other in zip(alone["validations"], together["validations"], strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-3)
    expected, found = (
        load_file(folder / work / "student.safetensors") for work in ("alone", "together")
    )
    before = load_file(folder / "model" / "model.safetensors")
    for name, tensor in expected.items():
        moved = (tensor - before[name]).abs().mean()
        assert (found[name] - tensor).abs().mean() < 0.02 * moved, name


def test_alone_every_exchange_is_the_identity() -> None:
    with joined("cpu") as ranks:
        assert ranks == Ranks()
        assert ranks.total([3.0]) == [3.0]
        assert ranks.agreed("same") == "same"
    assert not dist.is_initialized()
