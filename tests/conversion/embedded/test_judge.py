"""Judging a model folder says what its training said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from conversion.embedded.__main__ import pretrain
from conversion.embedded.attention import attention_kernels
from conversion.embedded.judge import Judge, load_network, main
from conversion.embedded.options import Phase
from tests.conversion.embedded.little_text import copy_of, text_folders
from tests.conversion.embedded.little_training import little_options
from tests.engine.model.tiny_models import make_checkpoint

HEADS = ((0, 3), (), (2,))
WINDOW = 16
QUIET = Console(quiet=True)
PHASE = Phase(
    length=256, steps=1, episodes=0.5, first_rate=1.0, last_rate=0.5, batch_tokens=512, limited=1.0
)
OPTIONS = little_options(
    PHASE, text=text_folders(), retrieval_heads=HEADS, window_tokens=WINDOW, seed=5
)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training whose result is exactly what its folder holds.

    The second training stands still: what it judges is a bfloat16 model, as an export is.
    """
    first, second = (tmp_path_factory.mktemp("judged") / name for name in ("first", "second"))
    pretrain(copy_of(prepared, first), OPTIONS, QUIET, documents=1)
    still = dataclasses.replace(OPTIONS, init=first / "model", matrix_rate=0.0, other_rate=0.0)
    with attention_kernels("flash", "cpu"):  # as the command does
        pretrain(copy_of(prepared, second), still, QUIET, documents=1)
    (second / "heads.json").write_text(json.dumps({"retrieval_heads": HEADS}))
    return second


def judge(trained: Path, *arguments: object, code: int = 0, model: Path | None = None) -> Any:
    """The JSON that the command prints, or what it says where it fails."""
    app = typer.Typer()
    app.command()(main)
    judged = trained / "model" if model is None else model
    given = (judged, "--corpus", trained / "corpus", "--device", "cpu", *arguments)
    result = CliRunner().invoke(app, [*map(str, given)])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.output


def test_a_folder_is_judged_as_its_training_was(trained: Path) -> None:
    expected = json.loads((trained / "training.json").read_text())
    roles = ("--heads", trained / "heads.json", "--window-tokens", WINDOW)
    found = judge(trained, "--documents", 1, "--seed", 5, *roles)
    same = ("parameters", "corpus", "judged", "held_out_loss", "facts", "limited", "hardware")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert found["judged"] == {"documents": 1, "seed": 5}
    weights = load_network(trained / "model", None, WINDOW, torch.device("cpu"))
    assert found["parameters"] == sum(p.numel() for p in weights.parameters())


def test_seed_and_documents_decide_which_facts_are_asked(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So small a network finds none of them: here a share is a sum of the ids that it is of."""

    def drawn(self: Judge, _: Any, kind: Any, length: int, facts: int, count: int) -> float:
        return sum(float(self._episode(kind, length, facts, n).ids.sum()) for n in range(count))

    monkeypatch.setattr(Judge, "facts", lambda *given, limited: drawn(*given))
    judged = [
        judge(trained, "--documents", documents, "--seed", seed)["facts"]["list"]["256"]["4"]
        for documents, seed in ((1, 5), (1, 6), (2, 5), (1, 5))
    ]
    assert judged[0] == judged[3] != judged[1]
    assert judged[2] > judged[0]


def test_heads_and_window_decide_what_limited_means(trained: Path) -> None:
    heads = ("--heads", trained / "heads.json", "--documents", 1)
    narrow, wide = (judge(trained, *heads, "--window-tokens", n)["limited"] for n in (WINDOW, 256))
    dense = judge(trained, "--documents", 1)
    assert "limited" not in dense
    assert wide["held_out_loss"]["256"] == pytest.approx(dense["held_out_loss"]["256"], rel=1e-4)
    assert abs(narrow["held_out_loss"]["256"] - dense["held_out_loss"]["256"]) > 1e-6


def test_the_text_must_be_of_the_models_tokenizer(trained: Path, tmp_path: Path) -> None:
    """Else ids would mean other words, and every figure would be wrong without a sign."""
    make_checkpoint("qwen3", tmp_path / "other")
    said = judge(trained, code=1, model=tmp_path / "other")
    assert "corpus: not of the tokenizer of" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--corpus", "/nowhere"), "/nowhere: not a prepared corpus"),
        (("--heads", "/nowhere"), "/nowhere: no list retrieval_heads"),
        (("--device", "abacus"), "device abacus is not there"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    trained: Path, arguments: tuple[str, str], message: str
) -> None:
    said = judge(trained, *arguments, code=1)
    assert message in said
    assert said.count("\n") == 1
