"""`rtpurbo ablate`: what each part of a converted model is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands.failure import fail
from server.commands.options import (
    DataOption,
    DecodedOption,
    DeviceOption,
    FactsOption,
    LengthsOption,
    SamplesOption,
    TextSamplesOption,
    names,
    numbers,
)


def ablate(
    model: Annotated[Path, typer.Argument(help="Converted model folder.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write; an unfinished one goes on.")],
    work: Annotated[
        Path | None, typer.Option(help="State of the conversion; default: MODEL.work if there.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="The dense folder that was converted: the reference.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups as in eval, comma separated.")
    ] = "code,code_passkey,text",
    lengths: LengthsOption = "4096,8192,16384",
    samples: SamplesOption = 20,
    facts: FactsOption = "1,4,16",
    text_samples: TextSamplesOption = 8,
    decoded: DecodedOption = 512,
    data: DataOption = None,
    seed: Annotated[int, typer.Option(help="Of documents, facts and random heads.")] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Show what each part of a converted MODEL is worth: replace one at a time and measure.

    Random heads, a closed-form indexer, no bias for ages, top-k instead of top-p, no distillation;
    other windows, other top_p, fewer heads, other index dimensions. Stop at any time and run it
    again.
    """
    from rich.console import Console

    from conversion.evaluation.ablation_table import print_ablations
    from conversion.evaluation.ablations import ablate as run_ablations
    from conversion.evaluation.options import EvalOptions
    from conversion.evaluation.tables import result_console
    from engine.errors import EngineError

    try:
        options = EvalOptions(
            tasks=names(tasks),
            lengths=numbers(lengths),
            samples=samples,
            teacher=teacher,
            facts=numbers(facts),
            text_samples=text_samples,
            decoded=decoded,
            data=data,
            seed=seed,
            device=device,
        )
        content = run_ablations(model, out, options, work, Console(stderr=True))
    except EngineError as error:
        fail(error)
    print_ablations(content, result_console())
