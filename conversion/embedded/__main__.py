"""Make the dense model that the embedded sparse one is converted from.

    python -m conversion.embedded OUT [--text FOLDER ...] [--seconds 500]

Leaves OUT/corpus (text and tokenizer), OUT/state.pt (training in progress), OUT/model (the result)
and OUT/training.json (every figure). Run it again to go on.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from conversion.embedded.corpus import Corpus
from conversion.embedded.export import export_network
from conversion.embedded.judge import Judge
from conversion.embedded.network import Network
from conversion.embedded.options import Phase, PretrainingOptions
from conversion.embedded.trainer import Trainer
from conversion.errors import ConversionError
from conversion.state import write_json
from engine.model.config_reader import read_config


def pretrain(
    out: Path,
    options: PretrainingOptions,
    console: Console,
    seconds: float | None = None,
    documents: int = 32,
) -> bool:
    """Prepare, train, judge, export. True if training came to its end.

    Args:
        seconds: stop training after so long, and judge what there is without exporting it.
        documents: per kind, length and number of facts, to judge by.

    Raises:
        ConversionError: one line; the text or the state is unusable.
    """
    begun = time.monotonic()
    corpus = Corpus.prepare(options.text, options.vocab_size, out / "corpus")
    console.print(
        f"corpus after {time.monotonic() - begun:.0f} s: {json.dumps(corpus.description)}"
    )
    settings = options.model_config()
    write_json(out / "config.json", settings)
    trainer = Trainer(corpus, read_config(out), options, out, console)
    network = trainer.run(seconds)
    report = _judge(network, corpus, options, documents)
    report |= {"steps": trainer.step, "losses": trainer.losses, "seconds": _since(begun)}
    write_json(out / "training.json", report)
    console.print_json(json.dumps({key: report[key] for key in ("held_out_loss", "facts")}))
    if trainer.done and not (out / "model").exists():
        export_network(network, settings, out / "corpus" / "tokenizer.json", out / "model")
        console.print(f"made {out / 'model'}")
    return trainer.done


def _judge(
    network: Network, corpus: Corpus, options: PretrainingOptions, documents: int
) -> dict[str, Any]:
    lengths = [n for n in (2048, 4096, 8192, 16384, 32768) if n <= options.max_length]
    report = Judge(corpus, options.seed).report(network, lengths or [options.max_length], documents)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    return {
        "command": " ".join(["python -m conversion.embedded", *sys.argv[2:]]),
        "hardware": f"{device}, {platform.machine()}, torch {torch.__version__}",
        "parameters": sum(p.numel() for p in network.parameters()),
        "corpus": corpus.description,
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        **report,
    }


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def _with_steps(phases: tuple[Phase, ...], text: str) -> tuple[Phase, ...]:
    try:
        counts = [int(part) for part in text.split(",")]
        pairs = zip(phases, counts, strict=True)
        return tuple(dataclasses.replace(phase, steps=count) for phase, count in pairs)
    except ValueError:
        raise ConversionError(f"steps must be {len(phases)} numbers, got {text!r}") from None


def main(
    out: Annotated[Path, typer.Argument(help="Folder to work in.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of Python sources; default: this environment's."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop training after so long.")] = None,
    documents: Annotated[int, typer.Option(help="Documents per cell of the judgement.")] = 32,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    steps: Annotated[
        str | None, typer.Option(help="Steps of every phase, comma separated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and judgement.")] = 0,
) -> None:
    """Train the dense model behind the embedded one."""
    options = PretrainingOptions(text=tuple(text or ()), device=device, seed=seed)
    try:
        if steps is not None:
            options = dataclasses.replace(options, phases=_with_steps(options.phases, steps))
        pretrain(out, options, Console(width=110), seconds, documents)
    except ConversionError as error:
        print(f"{out}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)
