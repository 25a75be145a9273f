"""When stage 2 ends: a gap that grows, and a cooldown that comes early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conversion.distillation import Distillation
from conversion.stop_rule import Gap
from conversion.training_state import TrainingState
from tests.conversion.tiny_distillation import KilledError, TinyDistillation, killed_at


def test_it_stops_when_the_gap_grows_and_keeps_the_weights_from_before(
    tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = iter([0.5, 0.4, 0.9])
    kept: list[bytes] = []

    def made_up(self: Distillation, step: int) -> Gap:
        return Gap(step, next(gaps), 0.5)

    save = TrainingState.save

    def noting(self: TrainingState, *args: Any) -> None:
        save(self, *args)
        kept.append(self.best_file(args[-1]).read_bytes())

    monkeypatch.setattr(Distillation, "validate", made_up)
    monkeypatch.setattr(TrainingState, "save", noting)

    report, printed = tiny.run("growing")

    assert report["stopped"] == "the gap grows: 0.900000 at step 4, smallest 0.400000 at step 2"
    assert report["stopped"] in printed
    assert report["steps"] == 4
    assert report["best"]["step"] == 2
    assert kept[0] != kept[1]
    assert kept[1] == kept[2] == tiny.weights("growing")


def made_up_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap that grows, stays, and falls in the end."""
    values = {0: 0.5, 2: 0.4, 4: 0.9, 6: 0.9, 8: 0.3}
    monkeypatch.setattr(Distillation, "validate", lambda _, step: Gap(step, values[step], 0.5))


def test_a_gap_that_grows_brings_the_cooldown_forward(
    tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_gaps(monkeypatch)
    rates: list[float] = []
    run = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return run(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    report, printed = tiny.run("cooled", steps=12, cooldown_steps=4, learning_rate=1.0)

    grown = "the gap grows: 0.900000 at step 4, smallest 0.400000 at step 2"
    assert f"distil: {grown}; the learning rate falls from here" in printed
    assert report["stopped"] == f"{grown}; then 4 steps of cooldown"
    assert report["steps"] == 8
    assert report["best"]["step"] == 8
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_cooldown_that_was_brought_forward_is_resumed(
    tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_gaps(monkeypatch)
    settings = {"steps": 12, "cooldown_steps": 4}
    whole, _ = tiny.run("cooled-whole", **settings)
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(KilledError):
            tiny.run("cooled-killed", **settings)

    report, _ = tiny.run("cooled-killed", **settings)

    assert report == whole
    assert tiny.weights("cooled-killed") == tiny.weights("cooled-whole")


def test_a_gap_that_is_no_number_ends_it_in_a_cooldown_too(
    tiny: TinyDistillation, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {0: 0.5, 2: 0.4, 4: 0.3, 6: float("nan")}
    monkeypatch.setattr(Distillation, "validate", lambda _, step: Gap(step, values[step], 0.5))
    report, _ = tiny.run("diverged", steps=8, cooldown_steps=4)
    assert report["stopped"] == "the gap grows: nan at step 6, smallest 0.300000 at step 4"
    assert report["best"]["step"] == 4
