"""The command line: its flags, what `inspect` says, and one line for whatever a user can get wrong.

A new flag must be added to FLAGS below: the list is there to be looked at.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from conversion.convert_options import ConvertOptions
from engine.embedded import embedded_model_path
from server.cli import app
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint

FLAGS = {
    "serve": """allow-unauthenticated api-key-file attention cache-generated cuda-graphs device
        dtype host index-dtype kernel-cache kernels kv-cache-gib log-format max-batch-tokens
        max-model-len max-num-seqs max-step-ms model-name port prefill-attention prefix-caching
        threads""",
    "health": "host live port timeout",
    "convert": """adaptive-top-p age-tokens block-tokens causal-check data dense-below device distil
        distil-batch distil-cooldown-steps distil-data distil-facts-share distil-learning-rate
        distil-sequences distil-steps distil-tokens document-tokens documents fit-learning-rate
        fit-steps heads heads-granularity heads-mass heads-share index-age-bias index-dim
        index-scope keep-far max-kv-heads seed sink-tokens top-p window-tokens""",
    "eval": """api-key-file attention concurrency data decoded depths device dtype facts haystack
        index-dtype json lengths out plots prefill-attention samples seed tasks teacher text-samples
        timeout url url-model""",
    "ablate": "data decoded device facts lengths samples seed tasks teacher text-samples work",
    "report": "ablations eval",
    "inspect": "gpu-gib index-dtype json plot",
    "build-kernels": "json kernel-cache targets",
    "bench attention": "json lengths only out peer peer-seconds plot quick",
    "bench chaos": "clients json seconds seed",
    "bench soak": "json minutes note out period streams",
    "bench serving": "output-tokens peer prompt-tokens streams threads",
}


def flags_of(path: str) -> set[str]:
    """Long option names of a subcommand, without the `--no-` forms and `--help`."""
    command = typer.main.get_command(app)
    for name in path.split():
        command = command.commands[name]  # type: ignore[attr-defined]  # every step is a group
    names = {name for parameter in command.params for name in parameter.opts}
    return {name.removeprefix("--") for name in names if name.startswith("--")} - {"help"}


@pytest.mark.parametrize("path", FLAGS)
def test_the_flags_are_those_listed_here(path: str) -> None:
    assert flags_of(path) == set(FLAGS[path].split())


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    "path",
    [
        "",
        "serve",
        "health",
        "convert",
        "eval",
        "ablate",
        "report",
        "inspect",
        "build-kernels",
        "bench serving",
        "bench chaos",
        "bench soak",
    ],
)
def test_help_teaches_every_flag(path: str) -> None:
    code, text, _ = run(*path.split(), "--help")
    assert code == 0
    assert "Usage" in text


def test_convert_hands_on_what_its_flags_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[ConvertOptions] = []

    def noting(model: Path, out: Path, options: ConvertOptions, console: Console) -> None:
        given.append(options)

    monkeypatch.setattr("conversion.pipeline.convert", noting)
    flags = ("--no-keep-far", "--adaptive-top-p", "--distil", "--distil-batch", "3")
    assert run("convert", tmp_path, tmp_path / "out", *flags)[0] == 0
    assert run("convert", tmp_path, tmp_path / "out")[0] == 0
    first, second = given
    assert first.distil is not None
    assert (first.fit.keep_far, first.fit.adaptive_top_p, first.distil.batch) == (False, True, 3)
    assert (second.fit.keep_far, second.fit.adaptive_top_p, second.distil) == (True, False, None)


def test_inspect_shows_head_map_costs_and_plan() -> None:
    code, text, _ = run("inspect")
    assert code == 0
    for words in ("retrieval heads", "KV per token", "memory plan", "tokens that fit", "#"):
        assert words in text


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias-by-age"])
def test_inspect_tells_of_a_bias_by_age(biased: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TinyModel(index_age_bias=biased))
    code, text, _ = run("inspect", folder)
    assert code == 0
    assert ("a bias by age" in text) == biased
    assert json.loads(run("inspect", "--json", folder)[1])["index_age_bias"] == biased


def test_inspect_as_json_agrees_with_itself() -> None:
    code, text, _ = run("inspect", "--json", "--gpu-gib", "24")
    report = json.loads(text)
    assert code == 0
    plan = report["memory_plan"]
    assert plan["device_bytes"] == 24 * 2**30
    assert plan["bytes_per_token"] == 2 * report["kv_elements_per_token"]
    assert plan["full_pages"] * plan["full_page_bytes"] <= 0.9 * 24 * 2**30
    assert plan["tokens"] == plan["full_pages"] * plan["block_tokens"]


def test_inspect_draws_the_head_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = run("inspect", "--plot", tmp_path / "heads.png")
    assert code == 0
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [("inspect",), ("serve",), ("serve", "--attention", "dense")],
    ids=["inspect", "serve", "serve-dense"],
)
def test_a_truncated_shard_is_one_line_that_names_the_file(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    shard = next(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100_000])
    command, *flags = arguments
    code, _, error = run(command, folder, *flags)
    assert code == 1
    assert shard.name in error
    assert len(error.strip().splitlines()) == 1


def test_a_gpu_that_is_too_small_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2**30
    (folder / "config.json").write_text(json.dumps(config))
    code, _, error = run("serve", folder, "--max-model-len", str(2**30), "--port", "0")
    assert code == 1
    assert "max_model_len 1073741824 needs" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "chess"), "unknown task 'chess'"),
        (("--lengths", "999999"), "999999"),
        (("--data", "/nowhere/at/all"), "no such file or folder"),
        (("--api-key-file", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--depths", "0,1.5"), "depths must be from 0 to 1"),
        (("--text-samples", "0"), "text_samples must be at least 1, got 0"),
        (("--decoded", "4096"), "decoded must be less than every length"),
        (("--concurrency", "0"), "concurrency must be at least 1, got 0"),
        (("--timeout", "0"), "timeout must be above 0, got 0"),
        (("--url-model", "m"), "url_model is for urls, and none is given"),
    ],
    ids=[
        "task",
        "length",
        "data",
        "key",
        "depths",
        "text-samples",
        "decoded",
        "concurrency",
        "timeout",
        "url-model",
    ],
)
def test_what_eval_cannot_do_is_one_line(flags: tuple[str, ...], message: str) -> None:
    code, _, error = run("eval", *flags)
    assert code == 1
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--depths", "", "'' is not a list of numbers"),
        ("--depths", "0,,1", "'0,,1' is not a list of numbers"),
        ("--lengths", "4k", "'4k' is not a list of positive numbers"),
        ("--attention", "flash", "'flash' is neither dense nor sparse"),
    ],
)
def test_a_value_that_is_no_value_is_one_line(flag: str, value: str, message: str) -> None:
    code, _, error = run("eval", flag, value)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_kernels_that_cannot_be_built_are_one_line(tmp_path: Path) -> None:
    code, _, error = run("build-kernels", "--targets", "hopper", "--kernel-cache", tmp_path)
    assert code == 1
    assert "'hopper' is not a target" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("value", ["0", "a", "1,,2", "-1"])
def test_streams_of_the_benchmark_are_positive_numbers(value: str) -> None:
    code, _, error = run("bench", "serving", "--streams", value)
    assert code == 2
    assert "not a list of positive numbers" in error
