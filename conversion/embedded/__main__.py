"""Make the dense model that the embedded sparse one is converted from.

    python -m conversion.embedded OUT [--text FOLDER ...] [--curriculum FILE] [--init MODEL]

Leaves OUT/corpus (text and tokenizer), OUT/state.pt (training in progress), OUT/partial (the model
where training was stopped), OUT/model (the result) and OUT/training.json (every figure). Run it
again to go on. Under torchrun several GPUs share every batch; the result is that of one GPU up to
the order of sums.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conversion.embedded.attention import Kernel, attention_kernels
from conversion.embedded.corpus import Corpus
from conversion.embedded.export import export_network
from conversion.embedded.judge import hardware, judgement
from conversion.embedded.network import Network
from conversion.embedded.options import (
    CURRICULUM,
    WINDOW_TOKENS,
    PretrainingOptions,
    read_curriculum,
)
from conversion.embedded.trainer import Trainer
from conversion.head_roles import read_heads
from conversion.parallel import Ranks, joined
from conversion.state import write_json
from engine.errors import EngineError
from engine.model.config_reader import read_config


def pretrain(
    out: Path,
    options: PretrainingOptions,
    console: Console,
    stop_after: float | None = None,
    documents: int = 32,
    command: str = "",
) -> bool:
    """Prepare, train, judge, export. True if training came to its end.

    Args:
        stop_after: seconds of training after which to save and stop.
        documents: per kind, length and number of facts, to judge by.
        command: what was typed, for the report.

    Raises:
        CheckpointError: one line; the model to start from is unusable.
        ConversionError: one line; the text or the state is.
    """
    with joined(options.device) as ranks:
        console = console if ranks.is_first else Console(quiet=True)
        corpus = _corpus(out, options, console, ranks)
        trainer = Trainer(corpus, read_config(out), options, out, console, ranks)
        network = trainer.run(stop_after)
        if not trainer.done:
            console.print(f"stopped after step {trainer.place.step}; repeat the command to go on")
            if ranks.is_first:
                shutil.rmtree(out / "partial", ignore_errors=True)
                _export(network, options, out, out / "partial", console)
        elif ranks.is_first:
            report = judgement(network, corpus, documents, options.seed)
            described = json.dumps(dataclasses.asdict(options), default=str)
            report |= {"options": json.loads(described), "command": command}
            report |= {"hardware": hardware(ranks.device, ranks.world)}
            report |= {"losses": trainer.losses, "progress": trainer.progress}
            write_json(out / "training.json", report)
            console.print_json(json.dumps({key: report[key] for key in ("held_out_loss", "facts")}))
            _export(network, options, out, out / "model", console)
    return trainer.done


def _corpus(out: Path, options: PretrainingOptions, console: Console, ranks: Ranks) -> Corpus:
    """The text, prepared by the first process; config.json of the model beside it."""
    begun = time.monotonic()
    folder = out / "corpus"
    if ranks.is_first:
        own = None if options.init is None else options.init / "tokenizer.json"
        Corpus.prepare(options.text, options.vocab_size, folder, own)
        write_json(out / "config.json", options.model_config())
    ranks.wait()
    corpus = Corpus.open(folder)
    seconds = time.monotonic() - begun
    console.print(f"corpus after {seconds:.0f} s: {json.dumps(corpus.description)}")
    return corpus


def _export(
    network: Network, options: PretrainingOptions, out: Path, model: Path, console: Console
) -> None:
    if not model.exists():
        tokenizer = out / "corpus" / "tokenizer.json"
        export_network(network, options.model_config(), tokenizer, model)
        console.print(f"made {model}")


def _retrieval_heads(path: Path) -> tuple[tuple[int, ...], ...]:
    """Those of a heads.json, for the shape that is trained here."""
    shape = PretrainingOptions()
    return tuple(map(tuple, read_heads(path, shape.layers, shape.heads)))


def main(
    out: Annotated[Path, typer.Argument(help="Folder to work in.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of Python sources; default: this environment's."),
    ] = None,
    curriculum: Annotated[
        Path | None, typer.Option(help="JSON list of phases; default: the built-in one.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from this model folder, and take its tokenizer.")
    ] = None,
    stop_after: Annotated[
        float | None, typer.Option(help="Save and stop after so many seconds of training.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="heads.json of a conversion: its retrieval heads, for limited phases."),
    ] = None,
    window_tokens: Annotated[
        int, typer.Option(help="That all other heads see in limited sequences.")
    ] = WINDOW_TOKENS,
    attention: Annotated[Kernel, typer.Option(help="Attention kernel on CUDA.")] = "flash",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the network: faster steps, minutes before the first of each length.",
        ),
    ] = True,
    documents: Annotated[
        int, typer.Option(min=1, help="Documents per cell of the judgement.")
    ] = 32,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and judgement.")] = 0,
) -> None:
    """Train the dense model behind the embedded one, under torchrun on several GPUs."""
    try:
        phases = CURRICULUM if curriculum is None else read_curriculum(curriculum)
        options = PretrainingOptions(
            text=tuple(text or ()),
            phases=phases,
            init=init,
            retrieval_heads=() if heads is None else _retrieval_heads(heads),
            window_tokens=window_tokens,
            device=device,
            compile=compiled,
            seed=seed,
        )
        with attention_kernels(attention, device):
            command = " ".join(["python -m conversion.embedded", *sys.argv[1:]])
            pretrain(out, options, Console(width=110), stop_after, documents, command)
    except EngineError as error:
        print(f"{out}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)
