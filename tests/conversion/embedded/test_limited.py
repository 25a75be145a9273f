"""Sequences limited to head roles in training: what they see, how many they are, what is judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from conversion import embedded
from conversion.embedded.__main__ import main, pretrain
from conversion.embedded.attention import head_roles
from conversion.embedded.batches import TrainingBatches
from conversion.embedded.corpus import Corpus
from conversion.embedded.network import Network
from conversion.embedded.options import Phase, PretrainingOptions, read_curriculum
from conversion.errors import ConversionError
from conversion.parallel import Ranks
from conversion.sequence import CachedSequence
from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.config_reader import read_config
from tests.conversion.embedded.little_text import copy_of, text_folders
from tests.conversion.embedded.little_training import little_options

HEADS = ((0, 3), (), (2,))
WINDOW, SINKS, LENGTH = 16, 2, 75
PHASE = Phase(
    length=256, steps=2, episodes=0.5, first_rate=1.0, last_rate=0.5, batch_tokens=1536, limited=0.5
)
CPU = torch.device("cpu")
EMBEDDED = Path(embedded.__file__).parent


@pytest.fixture
def options() -> PretrainingOptions:
    return little_options(PHASE, retrieval_heads=HEADS, window_tokens=WINDOW)


@pytest.fixture
def config(options: PretrainingOptions, tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(options.model_config()))
    return read_config(tmp_path)


@pytest.fixture
def network(config: ModelConfig) -> Network:
    network = Network(config, head_roles(config, HEADS, WINDOW, SINKS, CPU))
    network.initialise(3)
    for parameter in network.parameters():
        parameter.data.mul_(4)  # so that it matters what is seen
    return network


@pytest.fixture
def ids_BT(config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (3, LENGTH), generator=generator)


def served(network: Network, ids: Tensor, sparse: SparseAttentionConfig | None) -> Tensor:
    config = dataclasses.replace(network.config, sparse=sparse)
    sequence = CachedSequence(network.decoder, config, [None] * config.num_layers, len(ids))
    return sequence.prefill(ids.tolist())


@torch.no_grad()
def test_limited_sequences_see_what_the_served_model_sees(network: Network, ids_BT: Tensor) -> None:
    sparse = SparseAttentionConfig(
        retrieval_heads=HEADS, window_tokens=WINDOW, sink_tokens=SINKS, index_dim=None
    )
    hidden_BTE = network.hidden(ids_BT, limited=2).view(3, LENGTH, -1)
    for ids, hidden, roles in zip(ids_BT, hidden_BTE, (sparse, sparse, None), strict=True):
        torch.testing.assert_close(hidden, served(network, ids, roles), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(hidden_BTE[0], served(network, ids_BT[0], None), atol=1e-3)


def test_gradients_reach_every_weight_from_limited_sequences(
    network: Network, ids_BT: Tensor
) -> None:
    losses = network(ids_BT[:, :-1], ids_BT[:, 1:], torch.ones(3, LENGTH - 1), limited=3)
    torch.autograd.backward(losses.code)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.decoder.parameters())


def test_sequences_seen_both_ways(network: Network, ids_BT: Tensor) -> None:
    """The losses of code are averaged, and the ways compared at every target by its weight."""
    weights_BT = torch.rand(3, LENGTH - 1, generator=torch.Generator().manual_seed(1)) + 0.5
    given = (ids_BT[:, :-1], ids_BT[:, 1:], weights_BT)
    losses = network(*given, limited=1, both=True)
    one_way = [network(*given, limited=limited) for limited in (0, 3)]
    torch.testing.assert_close(losses.code, torch.stack([w.code for w in one_way]).mean())
    assert [float(way.agreement) for way in one_way] == [0.0, 0.0]
    dense, limited = (
        network.decoder.logits(network.hidden(ids_BT[:, :-1], n)).log_softmax(-1) for n in (0, 3)
    )
    there = torch.nn.functional.kl_div(limited, dense, log_target=True, reduction="none").sum(-1)
    back = torch.nn.functional.kl_div(dense, limited, log_target=True, reduction="none").sum(-1)
    expected = ((there + back) / 2 * weights_BT.flatten()).sum()
    torch.testing.assert_close(losses.agreement, expected)
    assert expected > 1


def test_the_focus_loss_is_of_limited_sequences_and_their_retrieval_heads(
    network: Network, config: ModelConfig
) -> None:
    ids_BT = torch.randint(config.vocab_size, (2, 129), generator=torch.Generator().manual_seed(0))
    given = (ids_BT[:, :-1], ids_BT[:, 1:], torch.ones(2, 128))
    assert float(network(*given, limited=2).focus) == 0.0
    losses = network(*given, both=True, focus=True)
    assert losses.focus > 0
    torch.autograd.backward(losses.focus)
    assert {name.split(".")[1] for name, _ in network.focus.named_parameters(prefix="focus")} == {
        str(layer) for layer, heads in enumerate(HEADS) if heads
    }
    assert all(p.grad is not None and p.grad.any() for p in network.focus.parameters())
    assert network.decoder.embedding.weight.grad is not None


@pytest.mark.parametrize("limited", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_limited_sequences_of_a_batch(
    options: PretrainingOptions, corpus: Corpus, limited: float, world: int
) -> None:
    phases = (dataclasses.replace(PHASE, limited=limited),)
    given = dataclasses.replace(options, phases=phases)
    shares = [
        TrainingBatches(corpus.train, corpus.tokenizer, given, 0, Ranks(rank, world))
        for rank in range(world)
    ]
    assert sum(share.limited for share in shares) == round(limited * 6)
    assert max(share.limited for share in shares) - min(share.limited for share in shares) <= 1


def run_main(*arguments: object) -> str:
    """What the command says where it ends."""
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--device", "cpu", *map(str, arguments)])
    assert result.exit_code == 1
    return result.output


def test_heads_come_from_the_file_of_a_conversion(tmp_path: Path) -> None:
    heads, curriculum, text = (tmp_path / name for name in ("heads.json", "phases.json", "text"))
    text.mkdir()
    curriculum.write_text(json.dumps([dataclasses.asdict(PHASE)]))
    given = (tmp_path / "out", "--text", text, "--curriculum", curriculum)
    assert "needs retrieval heads" in run_main(*given)
    heads.write_text(json.dumps({"retrieval_heads": [[1], [], [2, 0]], "scores": []}))
    assert "must list 8 layers" in run_main(*given, "--heads", heads)
    heads.write_text(json.dumps({"retrieval_heads": [[1], [], [2, 0], [], [], [7], [], []]}))
    assert "too little text" in run_main(*given, "--heads", heads)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (("--init", "/nowhere"), "/nowhere/tokenizer.json: not a tokenizer"),
        (("--device", "abacus"), "device abacus is not there"),
    ],
)
def test_what_training_cannot_begin_from_is_one_line(
    tmp_path: Path, argument: tuple[str, str], message: str
) -> None:
    said = run_main(tmp_path / "out", "--text", text_folders()[0], *argument)
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieval_heads": ()}, "needs retrieval heads"),
        ({"window_tokens": 0}, "window_tokens must be at least 1, got 0"),
        ({"phases": (dataclasses.replace(PHASE, limited=1.5),)}, "from 0 to 1, got 1.5"),
        ({"phases": (dataclasses.replace(PHASE, agreement=1.0),)}, "must have limited 1"),
        ({"phases": (dataclasses.replace(PHASE, focus=0.1),)}, "must have limited 1"),
        ({"phases": (dataclasses.replace(PHASE, focus=-0.1),)}, "at least 0"),
        ({"phases": (dataclasses.replace(PHASE, lists=1.1),)}, "from 0 to 1, got 1.1"),
        ({"phases": (dataclasses.replace(PHASE, answer_weight=1.0),)}, "above 1, got 1"),
        (
            {
                "phases": (
                    dataclasses.replace(PHASE, length=96, batch_tokens=960, limited=1.0, focus=0.1),
                )
            },
            "whole blocks of 64, got 96",
        ),
    ],
)
def test_impossible_limits(options: PretrainingOptions, change: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        dataclasses.replace(options, **change)


@pytest.mark.parametrize(
    "name", ["finish", "limited", "agreed", "agreed-lists", "far-lists", "near-lists"]
)
def test_the_curricula_beside_the_sources_can_be_trained(name: str) -> None:
    phases = read_curriculum(EMBEDDED / f"{name}.json")
    heads = json.loads((EMBEDDED / "limited-heads.json").read_text())["retrieval_heads"]
    PretrainingOptions(phases=phases, retrieval_heads=heads)


@pytest.mark.parametrize("name", ["far", "near"])
def test_figures_are_of_the_curriculum_of_their_name(name: str) -> None:
    options = json.loads((EMBEDDED / "averaged.json").read_text())[name]["options"]
    phases = read_curriculum(EMBEDDED / f"{name}-lists.json")
    assert tuple(Phase(**phase) for phase in options["phases"]) == phases


@pytest.mark.parametrize("change", [{}, {"limited": 1.0, "agreement": 2.0, "focus": 0.05}])
def test_a_training_with_limits_is_judged_both_ways(
    options: PretrainingOptions, prepared: Path, tmp_path: Path, change: Any
) -> None:
    out = copy_of(prepared, tmp_path / "out")
    phases = (dataclasses.replace(PHASE, **change),)
    given = dataclasses.replace(options, phases=phases, text=text_folders(), save_every=1)
    pretrain(out, given, Console(quiet=True), documents=1)
    report = json.loads((out / "training.json").read_text())
    assert report["limited"]["facts"].keys() == report["facts"].keys()
    assert report["limited"]["held_out_loss"] != report["held_out_loss"]
    assert "list, limited" in report["progress"][0]
