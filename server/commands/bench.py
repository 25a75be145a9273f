"""`rtpurbo bench`: measure, and print what the README quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.commands.failure import fail
from server.commands.options import JsonOption, ModelArgument, numbers


def bench_attention(
    lengths: Annotated[
        str | None,
        typer.Option(help="Context lengths in tokens, comma separated; default: 32K to 1M."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only 32K and 128K tokens.")] = False,
    only: Annotated[
        Literal["prefill", "decode"] | None, typer.Option(help="Leave the other one out.")
    ] = None,
    peer: Annotated[bool, typer.Option(help="Also measure FlashInfer, if installed.")] = True,
    peer_seconds: Annotated[
        float, typer.Option(help="Leave FlashInfer out if compiling and checking it takes longer.")
    ] = 300.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures as a picture.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file, after every row.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode attention of one layer beside dense attention, on this host's GPU."""
    try:
        from benchmarks.attention import LENGTHS, QUICK_LENGTHS, AttentionBench, BenchError, measure
    except ImportError as error:  # triton comes with the CUDA builds of torch only
        fail(f"bench attention needs a CUDA GPU and the package {error.name}")

    chosen = QUICK_LENGTHS if quick else LENGTHS
    bench = AttentionBench(
        lengths=numbers(lengths) if lengths else chosen,
        prefill=only != "decode",
        decode=only != "prefill",
        peer=peer,
        peer_seconds=peer_seconds,
        picture=plot,
        out=out,
    )
    try:
        result = measure(bench)
    except BenchError as error:
        fail(error)
    if as_json:
        print(json.dumps(result))


def bench_serving(
    model: ModelArgument = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 16384,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per stream.")] = 64,
    streams: Annotated[str, typer.Option(help="Numbers of streams, comma separated.")] = "1,8",
    threads: Annotated[int | None, typer.Option(help="torch threads of both sides.")] = None,
    peer: Annotated[bool, typer.Option(help="Also measure transformers' dense generate.")] = True,
) -> None:
    """Prefill and decode over HTTP beside transformers' dense generate; ends with a JSON line."""
    from rich.console import Console

    from benchmarks.serving import ServingBench, run_serving_bench
    from engine.embedded import embedded_model_path

    bench = ServingBench(
        model=str(model or embedded_model_path()),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        streams=numbers(streams),
        threads=threads,
        peer=peer,
    )
    result = run_serving_bench(bench, Console(stderr=True))
    print(json.dumps(result))
