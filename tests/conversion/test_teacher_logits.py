"""The teacher's answers: what they are, and that none is computed twice."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conversion.distil_data import Sample
from conversion.errors import ConversionError
from conversion.micro_batches import Shape
from conversion.parallel import Ranks
from conversion.student import Student
from conversion.teacher_logits import KEPT, TeacherCache, top_kl
from engine.model.checkpoint import preflight
from tests.engine.model.tiny_models import make_checkpoint

ALONE = Ranks()
SIZES = [(40, 7), (40, 7), (33, 7), (40, 5), (40, 7), (64, 1)]


def test_top_kl_is_the_sum_it_stands_for() -> None:
    teacher, student = torch.randn(2, 3, KEPT), torch.randn(2, 3, KEPT) * 3

    found = top_kl(teacher, student)

    assert found.shape == (2, 3)
    for z in range(2):
        for r in range(3):
            p = [math.exp(x) for x in teacher[z, r].tolist()]
            q = [math.exp(x) for x in student[z, r].tolist()]
            terms = (
                a / sum(p) * math.log(a / sum(p) * sum(q) / b) for a, b in zip(p, q, strict=True)
            )
            assert found[z, r].item() == pytest.approx(sum(terms), rel=1e-4)


def test_the_gradient_of_top_kl_is_the_difference_of_the_distributions() -> None:
    teacher = torch.randn(4, KEPT)
    student = torch.randn(4, KEPT, requires_grad=True)
    torch.autograd.backward(top_kl(teacher, student).sum())
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    theirs = make_checkpoint("llama", folder)
    return Student(preflight(folder), ALONE, torch.float32, recompute=False), theirs


def samples() -> Iterator[Sample]:
    rng = random.Random(0)
    for tokens, response in SIZES:
        yield Sample(rng.choices(range(320), k=tokens), response)


def test_answers_are_the_dense_model_s(
    model: tuple[Student, PreTrainedModel], tmp_path: Path
) -> None:
    student, theirs = model
    cache = TeacherCache(tmp_path / "teacher", {"of": "this"}, ALONE)

    assert list(cache.fill(student, samples(), micro_tokens=90, limit=5)) == [5]

    assert cache.shapes() == {n: Shape(*SIZES[n]) for n in range(5)}
    for number, sample in zip(range(5), samples(), strict=False):
        batch = cache.batch((number,))
        assert batch.ids_Zn.tolist() == [sample.ids]
        with torch.no_grad():
            logits: Tensor = theirs(torch.tensor([sample.ids])).logits[0]
        labels = logits[len(sample.ids) - sample.response - 1 : -1]
        expected = labels.topk(KEPT)
        assert torch.equal(batch.top_ids_ZRk[0], expected.indices)
        torch.testing.assert_close(batch.top_logits_ZRk[0], expected.values, rtol=1e-4, atol=1e-4)


def test_only_what_is_missing_is_computed(
    model: tuple[Student, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = model
    folder = tmp_path / "teacher"
    list(TeacherCache(folder, "a", ALONE).fill(student, samples(), micro_tokens=90, limit=6))
    whole = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for name in ("000002.safetensors", "000004.safetensors", "teacher.json"):
        (folder / name).unlink()
    computed: list[torch.Size] = []
    forward = student.model.forward

    def counting(ids_ZL: Tensor, rows: int, attention: object) -> Tensor:
        computed.append(ids_ZL.shape)
        return forward(ids_ZL, rows, attention)  # type: ignore[arg-type]

    monkeypatch.setattr(student.model, "forward", counting)

    cache = TeacherCache(folder, "a", ALONE)
    assert not cache.is_complete
    list(cache.fill(student, samples(), micro_tokens=90, limit=6))

    assert cache.is_complete
    assert sorted(map(tuple, computed)) == [(1, 32), (1, 39)]
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == whole


def test_answers_of_another_model_are_thrown_away(
    model: tuple[Student, PreTrainedModel], tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    list(TeacherCache(folder, "a", ALONE).fill(model[0], samples(), micro_tokens=90, limit=3))
    assert TeacherCache(folder, "a", ALONE).is_complete
    assert not TeacherCache(folder, "b", ALONE).is_complete
    assert not list(folder.glob("*.safetensors"))


def test_a_damaged_file_is_named(model: tuple[Student, PreTrainedModel], tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "teacher", "a", ALONE)
    list(cache.fill(model[0], samples(), micro_tokens=90, limit=3))
    (tmp_path / "teacher" / "000001.safetensors").write_bytes(b"half")
    with pytest.raises(ConversionError, match=r"000001.safetensors: not readable; remove"):
        cache.shapes()
    with pytest.raises(ConversionError, match=r"000001.safetensors: not readable; remove"):
        cache.batch((1,))


def test_no_text_at_all(model: tuple[Student, PreTrainedModel], tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "teacher", "a", ALONE)
    with pytest.raises(ConversionError, match="no text"):
        list(cache.fill(model[0], iter(()), micro_tokens=90, limit=3))
