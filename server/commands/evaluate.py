"""`rtpurbo eval`: flags become the options of an evaluation, its report text or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.commands.failure import fail
from server.commands.options import (
    DataOption,
    DecodedOption,
    DeviceOption,
    FactsOption,
    JsonOption,
    LengthsOption,
    ModelArgument,
    SamplesOption,
    TextSamplesOption,
    attention_modes,
    names,
    numbers,
    shares,
)


def evaluate(
    model: ModelArgument = None,
    tasks: Annotated[
        str,
        typer.Option(help="Tasks or groups (ruler, code, trace, grid, kv, text), comma separated."),
    ] = "code,code_passkey,trace,text",
    lengths: LengthsOption = "4096,8192,16384",
    samples: SamplesOption = 20,
    attention: Annotated[
        str | None,
        typer.Option(help="dense, sparse or both; default: both if the model is converted."),
    ] = None,
    prefill_attention: Annotated[
        Literal["sparse", "dense"],
        typer.Option(help="What retrieval heads of the sparse model read for prompt tokens."),
    ] = "dense",
    index_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option(help="Of the sparse model's index keys; auto: as keys and values."),
    ] = "auto",
    facts: FactsOption = "1,4,16",
    depths: Annotated[
        str, typer.Option(help="Depths of the passkey grid, 0 to 1, comma separated.")
    ] = "0,0.25,0.5,0.75,1",
    text_samples: TextSamplesOption = 8,
    decoded: DecodedOption = 512,
    teacher: Annotated[
        Path | None, typer.Option(help="Dense model to compare with instead of MODEL itself.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="Prose for RULER; default: docstrings of Python.")
    ] = None,
    data: DataOption = None,
    url: Annotated[
        list[str] | None,
        typer.Option(help="Measure a server instead: URL or NAME=URL; may be given again."),
    ] = None,
    url_model: Annotated[
        str | None, typer.Option(help="Model name for --url; default: the first that it lists.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key for --url.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests to --url at once.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds of one request to --url.")] = 600.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the JSON to this file, after every task and length."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots (needs matplotlib).")] = None,
    seed: Annotated[int, typer.Option(help="Of documents and facts.")] = 0,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="auto: bfloat16 on CUDA, else float32."),
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score MODEL on retrieval, tracing and text, dense against sparse on the same samples."""
    from rich.console import Console

    from conversion.evaluation.options import EvalOptions
    from conversion.evaluation.plots import plot_report
    from conversion.evaluation.report import EvalReport
    from conversion.evaluation.run import evaluate as run_evaluation
    from conversion.evaluation.tables import print_report, result_console
    from conversion.state import write_json
    from engine.embedded import embedded_model_path
    from engine.errors import EngineError
    from server.key_file import read_keys

    try:
        options = EvalOptions(
            tasks=names(tasks),
            lengths=numbers(lengths),
            samples=samples,
            attention=attention_modes(attention),
            prefill_attention=prefill_attention,
            index_dtype=index_dtype,
            facts=numbers(facts),
            depths=shares(depths),
            text_samples=text_samples,
            decoded=decoded,
            teacher=teacher,
            haystack=haystack,
            data=data,
            urls=tuple(url or ()),
            url_model=url_model,
            api_key=None if api_key_file is None else read_keys(api_key_file)[0],
            concurrency=concurrency,
            timeout=timeout,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        folder = model or embedded_model_path()

        def keep(report: EvalReport) -> None:
            if out is not None:
                write_json(out, report.as_dict())

        report = run_evaluation(folder, options, Console(stderr=True), keep=keep)
    except EngineError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    if as_json:
        print(json.dumps(report.as_dict()), flush=True)
    else:
        print_report(report, result_console())
    if plots is not None:  # last, so that a plot that fails does not take the results with it
        try:
            plot_report(report, plots)
        except EngineError as error:
            fail(error)
