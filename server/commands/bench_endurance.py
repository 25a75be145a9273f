"""`rtpurbo bench chaos` and `rtpurbo bench soak`: does the service survive, does it grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server.commands.failure import fail
from server.commands.options import JsonOption, ModelArgument


def bench_chaos(
    model: ModelArgument = None,
    seconds: Annotated[float, typer.Option(help="How long faults go on.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Draws requests, clients and faults.")] = 0,
    clients: Annotated[int, typer.Option(help="Requests in flight.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Kill, stop and garble the engine at random, and compare every answer with the right one.

    Exit code 1 if a request was lost, an answer differed, or the server did not come to rest.
    """
    from rich.console import Console

    try:
        from benchmarks.chaos import ChaosBench, run_chaos
    except ImportError as error:
        fail(f"bench chaos needs the package {error.name}: pip install 'rtpurbo[bench]'")
    from benchmarks.workload import code_prompt
    from engine.embedded import embedded_model_path
    from engine.tokenizer import Tokenizer

    folder = model or embedded_model_path()
    tokenizer = Tokenizer.from_folder(folder)
    bench = ChaosBench(
        model=str(folder),
        make_prompt=lambda tokens, seed: code_prompt(tokenizer, tokens, seed),
        seconds=seconds,
        seed=seed,
        clients=clients,
    )
    result = run_chaos(bench, Console(stderr=True, quiet=as_json))
    print(json.dumps(result))
    if not result["passed"]:
        raise typer.Exit(1)


def bench_soak(
    model: ModelArgument = None,
    minutes: Annotated[int, typer.Option(min=6, help="How long; the first 3 are not judged.")] = 30,
    streams: Annotated[int, typer.Option(help="Clients, each with one request at a time.")] = 2,
    period: Annotated[
        float, typer.Option(help="Seconds between the starts of a client's requests.")
    ] = 6.0,
    note: Annotated[str, typer.Option(help="On the circumstances; kept with the figures.")] = "",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Steady load; memory, descriptors, threads and latencies of every minute must stay flat.

    Exit code 1 if a series grows or a request was lost.
    """
    from rich.console import Console

    try:
        from benchmarks.soak import SoakBench, run_soak
    except ImportError as error:
        fail(f"bench soak needs the package {error.name}: pip install 'rtpurbo[bench]'")
    from engine.embedded import embedded_model_path

    bench = SoakBench(
        model=str(model or embedded_model_path()),
        minutes=minutes,
        streams=streams,
        period=period,
        note=note,
    )
    result = run_soak(bench, Console(stderr=True, quiet=as_json))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if not result["flat"] or result["lost"]:
        raise typer.Exit(1)
