"""The mean of trainings: every weight of it, what comes with it, and what has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from conversion.embedded.average import average, main
from conversion.errors import ConversionError
from engine.errors import CheckpointError
from engine.model.checkpoint import INDEX_FILE
from tests.engine.model.tiny_models import add_section, make_checkpoint

SECTION = {
    "retrieval_heads": [[0], [], [4]],
    "window_tokens": 16,
    "sink_tokens": 2,
    "index_dim": 4,
    "block_tokens": 16,
    "top_p": 0.9,
}


def make_sharded(folder: Path, seed: int) -> None:
    """A bfloat16 model in two shards."""
    make_checkpoint("qwen3", folder, seed=seed, tie_word_embeddings=True)
    single = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(single).items()}
    single.unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard, {"format": "pt"})
    places = {name: shard for shard, own in shards.items() for name in own}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        make_sharded(folder, seed)
    return folders


@pytest.mark.parametrize("weights", [(0.5, 0.5), (7.0, 3.0)])
def test_every_weight_is_the_mean_rounded_once(
    models: list[Path], tmp_path: Path, weights: tuple[float, float]
) -> None:
    out = tmp_path / "new" / "out"
    average(out, models, weights)
    first, second, found = (weights_of(folder) for folder in (*models, out))
    assert found.keys() == first.keys()
    one, other = (weight / sum(weights) for weight in weights)
    for name, tensor in found.items():
        mean = one * first[name].float() + other * second[name].float()
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, mean.bfloat16()), name
        assert not torch.equal(tensor, first[name]), name
    assert {file.name for file in out.iterdir()} == {file.name for file in models[0].iterdir()}
    for name in ("config.json", "tokenizer.json", INDEX_FILE):
        assert (out / name).read_bytes() == (models[0] / name).read_bytes()


def test_the_command_weighs_all_alike(models: list[Path], tmp_path: Path) -> None:
    run_main(tmp_path / "even", *models, models[0])
    average(tmp_path / "expected", [*models, models[0]], (1, 1, 1))
    run_main(tmp_path / "given", *models, models[0], "--weights", "2,1,1e-30")
    even, expected, given = (weights_of(tmp_path / n) for n in ("even", "expected", "given"))
    for name, tensor in even.items():
        assert torch.equal(tensor, expected[name])
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in given.items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("1", "one per model, got 1 of 2"),
        ("1,2,3", "one per model, got 3 of 2"),
        ("1,0", r"positive and finite, got [1.0, 0.0]"),
        ("1,-1", "positive and finite"),
        ("1,nan", "positive and finite"),
        ("inf,1", "positive and finite"),
        ("1,half", "numbers with commas between, got '1,half'"),
    ],
)
def test_impossible_weights_are_one_line(
    models: list[Path], tmp_path: Path, weights: str, message: str
) -> None:
    said = run_main(tmp_path / "out", *models, "--weights", weights, code=1)
    assert message in said
    assert said.count("\n") == 1
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["first", "second"]


def other_norm(folder: Path) -> None:
    change_config(folder, rms_norm_eps=1e-6)


def other_dtype(folder: Path) -> None:
    file = folder / "model-2.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].float()}, file, {"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def converted(folder: Path) -> None:
    add_section(folder, SECTION)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_norm, r"second/config.json: rms_norm_eps is 1e-06, not 1e-05 as in .*first"),
        (other_dtype, r"second/model-2.safetensors: tensor .* has dtype F32, not BF16 as in"),
        (other_tokenizer, r"second/tokenizer.json: is not that of .*first"),
        (converted, r"second: is converted"),
    ],
)
def test_models_unlike_the_first_have_no_mean(
    models: list[Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    change(models[1])
    with pytest.raises(ConversionError, match=message):
        average(tmp_path / "out", models, (1, 1))
    assert not (tmp_path / "out").exists()


def test_other_shapes_and_missing_folders_are_named(models: list[Path], tmp_path: Path) -> None:
    """A folder that fits its own config can differ from the first one's in that only."""
    change_config(models[1], intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"second/.*mlp.* has shape"):
        average(tmp_path / "out", models, (1, 1))
    with pytest.raises(CheckpointError, match="third: no such folder"):
        average(tmp_path / "out", [models[0], tmp_path / "third"], (1, 1))
    with pytest.raises(ConversionError, match="at least 2 models, got 1"):
        average(tmp_path / "out", models[:1], (1,))


def test_what_is_there_already_stays(models: list[Path]) -> None:
    before = weights_of(models[0])
    with pytest.raises(ConversionError, match="exists already"):
        average(models[0], models, (1, 1))
    assert all(torch.equal(tensor, before[n]) for n, tensor in weights_of(models[0]).items())


def test_a_mean_that_cannot_be_written_leaves_nothing(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conversion.export.shutil.copyfile", full)
    with pytest.raises(ConversionError, match="No space left"):
        average(tmp_path / "out", models, (1, 1))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["first", "second"]


def run_main(*arguments: object, code: int = 0) -> str:
    """What the command says, and that it ends so."""
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output
