"""Stage 2 as a whole: what it measures, that it learns, and goes on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conversion.distillation import Distillation
from conversion.errors import ConversionError
from conversion.sequence import CachedSequence
from conversion.teacher_logits import TeacherCache
from engine.model.weights import load_decoder
from tests.conversion.tiny_distillation import (
    OPTIONS,
    KilledError,
    TinyDistillation,
    killed_at,
)


@pytest.fixture(scope="module")
def whole(tiny: TinyDistillation) -> dict[str, Any]:
    """A run that nobody interrupted, in `whole`."""
    report, _ = tiny.run("whole")
    return report


def test_the_gap_before_training_is_what_serving_shows(
    tiny: TinyDistillation, whole: dict[str, Any]
) -> None:
    """Teacher: dense prefill. Student: the paged cache, its prefill rule and its decode rule."""
    decoder = load_decoder(tiny.checkpoint, "cpu", torch.float32)
    dense = replace(decoder.config, sparse=None)
    kl, agreeing, rows = 0.0, 0, 0
    for number in range(OPTIONS.validation_sequences):
        file = load_file(tiny.folder / "whole" / "teacher" / f"{number:06d}.safetensors")
        ids, response = file["ids"].tolist(), OPTIONS.response_tokens
        teacher = CachedSequence(decoder, dense, [None] * 3, len(ids)).prefill(ids[:-1])[-response:]
        served = CachedSequence(decoder, decoder.config, decoder.indexers, len(ids))
        prompt = served.prefill(ids[:-response])[-1:]
        student = torch.cat([prompt, served.decode(ids[-response:-1])])
        with torch.no_grad():
            theirs, ours = decoder.logits(teacher), decoder.logits(student)
        top = theirs.topk(10)
        p, q = top.values.softmax(-1), ours.gather(-1, top.indices).softmax(-1)
        kl += float((p * (p / q).log()).sum())
        agreeing += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        rows += response
    assert whole["before"]["kl"] == pytest.approx(kl / rows, rel=1e-4)
    assert whole["before"]["agreement"] == pytest.approx(agreeing / rows)
    assert kl / rows > 0.1


def test_the_gap_shrinks_and_the_best_weights_are_kept(
    tiny: TinyDistillation, whole: dict[str, Any]
) -> None:
    assert whole["stopped"] == "all 6 steps are done"
    assert whole["best"]["kl"] < 0.8 * whole["before"]["kl"]
    assert [gap["step"] for gap in whole["validations"]] == [0, 2, 4, 6]
    assert len(whole["losses"]) == 6
    assert sorted(p.name for p in (tiny.folder / "whole").iterdir()) == [
        "distil.json",
        "student.safetensors",
        "teacher",
    ]
    trained = load_file(tiny.folder / "whole" / "student.safetensors")
    before = load_file(tiny.folder / "model" / "model.safetensors")
    assert trained.keys() == before.keys()
    assert not any(torch.equal(trained[name], before[name]) for name in trained)


def test_a_training_that_is_done_is_not_done_again(
    tiny: TinyDistillation, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distillation, "step", None)
    report, printed = tiny.run("whole")
    assert report == json.loads(json.dumps(whole))
    assert printed == ""


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_resumed_training_ends_bit_for_bit_as_the_whole_one(
    tiny: TinyDistillation, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    work = f"killed{step}"
    with monkeypatch.context() as patch:
        killed_at(step, patch)
        with pytest.raises(KilledError):
            tiny.run(work)
    first: list[int] = []
    run = Distillation.step

    def noting(self: Distillation, number: int, steps: int) -> float:
        first.append(number)
        return run(self, number, steps)

    monkeypatch.setattr(Distillation, "step", noting)

    report, _ = tiny.run(work)

    assert first[0] == step // 2 * 2
    assert report == whole
    assert tiny.weights(work) == tiny.weights("whole")


def test_killed_between_the_best_weights_and_the_report(
    tiny: TinyDistillation, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(path: Path, value: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("conversion.distil.write_json", dying)
        with pytest.raises(KilledError):
            tiny.run("unreported")

    report, _ = tiny.run("unreported")

    assert report == whole
    assert tiny.weights("unreported") == tiny.weights("whole")


def test_other_options_begin_again(tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(KilledError):
            tiny.run("changed")

    report, _ = tiny.run("changed", learning_rate=2e-3)
    fresh, _ = tiny.run("fresh", learning_rate=2e-3)

    assert report == fresh
    assert tiny.weights("changed") == tiny.weights("fresh")


@pytest.mark.parametrize(
    "changes", [{"micro_tokens": 1}, {"micro_tokens": 10_000}, {"recompute": False}]
)
def test_how_it_is_computed_does_not_matter(
    tiny: TinyDistillation, whole: dict[str, Any], changes: dict[str, Any]
) -> None:
    name = "-".join(map(str, changes.values()))
    report, _ = tiny.run(name, **changes)
    assert report["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert report["best"]["kl"] == pytest.approx(whole["best"]["kl"], rel=1e-3)


def test_a_state_of_other_processes_is_refused(
    tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(2, monkeypatch)
    with pytest.raises(KilledError):
        tiny.run("alone")
    path = tiny.folder / "alone" / "training" / "progress.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "processes": 2}))
    with pytest.raises(ConversionError, match="begun with 2 processes, not 1"):
        tiny.run("alone")
    next(path.parent.glob("state-*")).write_bytes(b"half")
    path.write_text(json.dumps(found))
    with pytest.raises(ConversionError, match="not readable; remove"):
        tiny.run("alone")


def test_the_teacher_is_asked_once(tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(0, monkeypatch)
    with pytest.raises(KilledError):
        tiny.run("asked")
    monkeypatch.setattr(TeacherCache, "fill", None)
    with pytest.raises(KilledError):
        tiny.run("asked")
