"""The `rtpurbo` command: the composition root, the one file that may import every package.

Each subcommand imports what it needs when it runs, so that `--help` is quick and the front end
never loads torch. The file is long because all flags of all commands stand in it, with what they
mean; none of them does anything here but become a field of a settings object.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a full-attention language model into a sparse one, and serve it over HTTP.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure, and print what the README quotes.")
app.add_typer(bench_app, name="bench")

ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="Model folder; without it the embedded model.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def serve(
    model: ModelArgument = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name in /v1/models and metrics; default: the folder's.")
    ] = None,
    attention: Annotated[
        Literal["sparse", "dense"] | None,
        typer.Option(help="dense serves a converted model with full attention."),
    ] = None,
    prefill_attention: Annotated[
        Literal["sparse", "dense"] | None,
        typer.Option(help="sparse: retrieval heads read only selected blocks of a prompt too."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(help="auto: bfloat16 on CUDA, else float32."),
    ] = None,
    kernels: Annotated[
        Literal["auto", "cuda", "torch"] | None,
        typer.Option(help="Of decode attention; auto: cuda where they can be had, else torch."),
    ] = None,
    kernel_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of compiled kernels; default: ~/.cache/rtpurbo/kernels."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and output together, in tokens.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences computed together.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one engine step; prefill is cut to fit.")
    ] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="Memory for the KV cache in GiB; default: measured.")
    ] = None,
    prefix_caching: Annotated[
        bool | None, typer.Option(help="Reuse the KV pages of shared prompt prefixes.")
    ] = None,
    cache_generated: Annotated[
        bool | None,
        typer.Option(help="Also reuse pages of generated tokens (last digits may differ)."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with API keys, one a line.")
    ] = None,
    allow_unauthenticated: Annotated[
        bool | None, typer.Option(help="Listen on other than loopback without a key.")
    ] = None,
) -> None:
    """Serve MODEL on an OpenAI-compatible HTTP API.

    MODEL is a converted folder, a plain dense one, or one with RTP-LLM's headwise_config. Every
    flag has an environment variable of the same name (RTPURBO_PORT and so on); flags win.
    """
    from engine.embedded import embedded_model_path
    from engine.errors import EngineError
    from server.config import ServerConfig
    from server.runner import run_server

    _refuse_hub_kernels()
    flags = {
        "model": model,
        "host": host,
        "port": port,
        "model_name": model_name,
        "api_key_file": api_key_file,
        "allow_unauthenticated": allow_unauthenticated,
        "attention": attention,
        "prefill_attention": prefill_attention,
        "device": device,
        "dtype": dtype,
        "kernels": kernels,
        "kernel_cache": kernel_cache,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_batch_tokens": max_batch_tokens,
        "kv_cache_gib": kv_cache_gib,
        "prefix_caching": prefix_caching,
        "cache_generated": cache_generated,
        "threads": threads,
    }
    try:
        config = ServerConfig.resolve(_given(flags), embedded_model_path())
        raise typer.Exit(run_server(config))
    except EngineError as error:
        _fail(error)


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="Folder of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Text file or folder; default: Python sources of this environment."),
    ] = None,
    heads_share: Annotated[
        float, typer.Option(help="Share of the query heads that keep the full context.")
    ] = 0.15,
    heads_mass: Annotated[
        float | None, typer.Option(help="Instead: share of the summed needle scores.")
    ] = None,
    heads_granularity: Annotated[
        Literal["query_head", "kv_head"],
        typer.Option(help="kv_head keeps all query heads of the best KV heads."),
    ] = "query_head",
    max_kv_heads: Annotated[
        int | None, typer.Option(help="Keep heads of so many KV heads only: a smaller KV cache.")
    ] = None,
    causal_check: Annotated[
        bool, typer.Option(help="Choose among twice as many heads by the retrieval that is lost.")
    ] = False,
    window_tokens: Annotated[int, typer.Option(help="Window of the local heads.")] = 8192,
    sink_tokens: Annotated[int, typer.Option(help="First tokens that all heads see.")] = 4,
    index_dim: Annotated[int, typer.Option(help="Dimensions of the index.")] = 16,
    index_scope: Annotated[
        Literal["query_head", "kv_head"], typer.Option(help="Index keys per query or KV head.")
    ] = "query_head",
    block_tokens: Annotated[int, typer.Option(help="Tokens of a KV page, a power of two.")] = 64,
    top_p: Annotated[float, typer.Option(help="Attention mass that selection keeps.")] = 0.9,
    dense_below: Annotated[
        int, typer.Option(help="Context length below which decoding attends everything.")
    ] = 0,
    documents: Annotated[int, typer.Option(help="Documents for the needle scores.")] = 4,
    document_tokens: Annotated[int, typer.Option(help="Length of a document.")] = 8192,
    fit_steps: Annotated[
        int, typer.Option(help="Steps of the indexer's training, a document each; 0: closed form.")
    ] = 600,
    fit_learning_rate: Annotated[
        float, typer.Option(help="Of the indexer; small models bear more, about 1e-2.")
    ] = 1e-3,
    adaptive_top_p: Annotated[
        bool, typer.Option(help="A top_p per head, so that the kept mass reaches --top-p.")
    ] = False,
    distil: Annotated[
        bool | None,
        typer.Option(help="Adapt the weights by distillation; default: on CUDA only."),
    ] = None,
    distil_data: Annotated[
        Path | None,
        typer.Option(help="JSONL with prompt and response, or text; default: as --data."),
    ] = None,
    distil_tokens: Annotated[int, typer.Option(help="Length of a training sequence.")] = 16384,
    distil_steps: Annotated[int, typer.Option(help="Optimizer steps at most.")] = 600,
    distil_learning_rate: Annotated[
        float, typer.Option(help="Of distillation; small models bear more, about 1e-4.")
    ] = 3e-6,
    seed: Annotated[int, typer.Option(help="Of documents, needles and samples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Make a sparse model of a dense one: calibrate, fit the indexer, distil, export.

    State is kept in OUT.work: stop at any time and run the same command again. Edit
    OUT.work/heads.json after calibration to choose heads by hand. Several GPUs share the work when
    the command is started under torchrun.
    """
    from rich.console import Console

    from conversion.convert_options import ConvertOptions
    from conversion.distil_options import DistilOptions
    from conversion.fit_options import FitOptions
    from conversion.pipeline import convert as run_conversion
    from engine.errors import EngineError

    try:
        training = None
        if distil or (distil is None and device.startswith("cuda")):
            training = DistilOptions(
                data=distil_data,
                sequence_tokens=distil_tokens,
                steps=distil_steps,
                learning_rate=distil_learning_rate,
                seed=seed,
                device=device,
            )
        options = ConvertOptions(
            data=data,
            heads_share=heads_share,
            heads_mass=heads_mass,
            max_kv_heads=max_kv_heads,
            window_tokens=window_tokens,
            sink_tokens=sink_tokens,
            index_dim=index_dim,
            index_scope=index_scope,
            block_tokens=block_tokens,
            top_p=top_p,
            dense_below=dense_below,
            documents=documents,
            document_tokens=document_tokens,
            heads_granularity=heads_granularity,
            causal_check=causal_check,
            fit=FitOptions(
                steps=fit_steps,
                learning_rate=fit_learning_rate,
                adaptive_top_p=adaptive_top_p,
            ),
            distil=training,
            seed=seed,
            device=device,
        )
        run_conversion(model, out, options, Console(stderr=True))
    except EngineError as error:
        _fail(error)


@app.command("eval")
def evaluate(
    model: ModelArgument = None,
    tasks: Annotated[
        str,
        typer.Option(help="Tasks or groups (ruler, code, trace, grid, kv, text), comma separated."),
    ] = "code,code_passkey,trace,text",
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer, comma separated.")
    ] = "4096,8192,16384",
    samples: Annotated[
        int, typer.Option(help="Documents or prompts per task, length and setting.")
    ] = 20,
    attention: Annotated[
        str | None,
        typer.Option(help="dense, sparse or both; default: both if the model is converted."),
    ] = None,
    prefill_attention: Annotated[
        Literal["sparse", "dense"],
        typer.Option(help="What retrieval heads of the sparse model read for prompt tokens."),
    ] = "dense",
    facts: Annotated[
        str, typer.Option(help="Planted facts of a document, comma separated.")
    ] = "1,4,16",
    depths: Annotated[
        str, typer.Option(help="Depths of the passkey grid, 0 to 1, comma separated.")
    ] = "0,0.25,0.5,0.75,1",
    text_samples: Annotated[int, typer.Option(help="Documents of the task text.")] = 8,
    decoded: Annotated[
        int, typer.Option(help="Tokens at a text's end that run under the decode rule.")
    ] = 512,
    teacher: Annotated[
        Path | None, typer.Option(help="Dense model to compare with instead of MODEL itself.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="Prose for RULER; default: docstrings of Python.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text of code and text tasks; default: Python sources.")
    ] = None,
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
    plots: Annotated[Path | None, typer.Option(help="Folder for plots (needs matplotlib).")] = None,
    seed: Annotated[int, typer.Option(help="Of documents and facts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
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
    from conversion.evaluation.run import evaluate as run_evaluation
    from conversion.evaluation.tables import print_report
    from engine.embedded import embedded_model_path
    from engine.errors import EngineError
    from server.key_file import read_keys

    try:
        options = EvalOptions(
            tasks=_names(tasks),
            lengths=_numbers(lengths),
            samples=samples,
            attention=_attention(attention),
            prefill_attention=prefill_attention,
            facts=_numbers(facts),
            depths=_shares(depths),
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
        report = run_evaluation(model or embedded_model_path(), options, Console(stderr=True))
    except EngineError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    if as_json:
        print(json.dumps(report.as_dict()), flush=True)
    else:
        print_report(report, Console())
    if plots is not None:  # last, so that a plot that fails does not take the results with it
        try:
            plot_report(report, plots)
        except EngineError as error:
            _fail(error)


@app.command()
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
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer, comma separated.")
    ] = "4096,8192,16384",
    samples: Annotated[
        int, typer.Option(help="Documents or prompts per task, length and setting.")
    ] = 20,
    facts: Annotated[
        str, typer.Option(help="Planted facts of a document, comma separated.")
    ] = "1,4,16",
    text_samples: Annotated[int, typer.Option(help="Documents of the task text.")] = 8,
    decoded: Annotated[
        int, typer.Option(help="Tokens at a text's end that run under the decode rule.")
    ] = 512,
    data: Annotated[
        Path | None, typer.Option(help="Text of code and text tasks; default: Python sources.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of documents, facts and random heads.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Show what each part of a converted MODEL is worth: replace one at a time and measure.

    Random heads, a closed-form indexer, top-k instead of top-p, no distillation; other windows,
    other top_p, fewer heads, other index dimensions. Stop at any time and run it again.
    """
    from rich.console import Console

    from conversion.evaluation.ablation_table import print_ablations
    from conversion.evaluation.ablations import ablate as run_ablations
    from conversion.evaluation.options import EvalOptions
    from engine.errors import EngineError

    try:
        options = EvalOptions(
            tasks=_names(tasks),
            lengths=_numbers(lengths),
            samples=samples,
            teacher=teacher,
            facts=_numbers(facts),
            text_samples=text_samples,
            decoded=decoded,
            data=data,
            seed=seed,
            device=device,
        )
        content = run_ablations(model, out, options, work, Console(stderr=True))
    except EngineError as error:
        _fail(error)
    print_ablations(content, Console())


@app.command("report")
def make_report(
    out: Annotated[Path, typer.Argument(help="Converted model folder.")],
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="File of `eval --json`, instead of earlier ones; again: more."),
    ] = None,
    ablations: Annotated[Path | None, typer.Option(help="File that `ablate` wrote.")] = None,
) -> None:
    """Make OUT/report again: head map, indexer, training, and what evaluations have found.

    What is not given anew is kept from the report that is there.
    """
    from rich.console import Console

    from conversion.report.report_folder import make_report as run_report
    from engine.errors import EngineError

    console = Console(stderr=True)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        print(run_report(out, tell, evaluations=evaluations or (), ablations=ablations))
    except EngineError as error:
        _fail(error)


@app.command()
def inspect(
    model: ModelArgument = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the head map (needs matplotlib).")
    ] = None,
    gpu_gib: Annotated[
        float, typer.Option(min=0.1, help="Plan the memory of a GPU of this size.")
    ] = 80,
) -> None:
    """Show a model folder's head map, what a token of context costs, and a memory plan."""
    from engine.embedded import embedded_model_path
    from engine.errors import EngineError
    from server.model_report import model_report, plot_head_map, render_report

    folder = model or embedded_model_path()
    try:
        size = int(gpu_gib * 2**30)
        print(json.dumps(model_report(folder, size)) if as_json else render_report(folder, size))
        if plot is not None:
            plot_head_map(folder, plot)
    except EngineError as error:
        _fail(error)
    except ImportError:
        _fail("--plot needs matplotlib: pip install 'rtpurbo[plot]'")


@app.command("build-kernels")
def build_kernels(
    kernel_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of compiled kernels; default: ~/.cache/rtpurbo/kernels."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities such as 80,90,120, or all; default: of the GPU at hand."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile the CUDA kernels ahead of time, for this host's GPU or for an image without nvcc."""
    from rich.console import Console

    from kernels._build import TARGETS, KernelBuildError, default_cache, find_library

    chosen = TARGETS if targets == "all" else _names(targets or "")
    try:
        with Console(stderr=True).status("Compiling CUDA kernels, up to a minute per target"):
            library = find_library(kernel_cache or default_cache(), chosen)
    except KernelBuildError as error:
        _fail(error)
    print(json.dumps({"library": str(library)}) if as_json else library)


@bench_app.command("attention")
def bench_attention(
    lengths: Annotated[
        str | None,
        typer.Option(help="Context lengths in tokens, comma separated; default: 32K to 1M."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only 32K and 128K tokens.")] = False,
    only: Annotated[
        Literal["prefill", "decode"] | None, typer.Option(help="Leave the other one out.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures as a picture.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode attention of one layer beside dense attention, on this host's GPU."""
    try:
        from benchmarks.attention import LENGTHS, QUICK_LENGTHS, AttentionBench, BenchError, measure
    except ImportError as error:  # triton comes with the CUDA builds of torch only
        _fail(f"bench attention needs a CUDA GPU and the package {error.name}")

    chosen = QUICK_LENGTHS if quick else LENGTHS
    bench = AttentionBench(
        lengths=_numbers(lengths) if lengths else chosen,
        prefill=only != "decode",
        decode=only != "prefill",
    )
    try:
        result = measure(bench, plot)
    except BenchError as error:
        _fail(error)
    if as_json:
        print(json.dumps(result))


@bench_app.command("serving")
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
        streams=_numbers(streams),
        threads=threads,
        peer=peer,
    )
    result = run_serving_bench(bench, Console(stderr=True))
    print(json.dumps(result))


def main() -> None:
    """Entry point of the console script."""
    app()


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that stand on the command line; the others are left to the environment."""
    return {name: value for name, value in flags.items() if value is not None}


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _attention(text: str | None) -> tuple[Literal["dense", "sparse"], ...]:
    found: list[Literal["dense", "sparse"]] = []
    for name in _names(text or ""):
        if name == "dense":
            found.append("dense")
        elif name == "sparse":
            found.append("sparse")
        else:
            _misused(f"{name!r} is neither dense nor sparse")
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        _misused(f"{text!r} is not a list of positive numbers such as 1,8")
    return numbers


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        _misused(f"{text!r} is not a list of numbers such as 0,0.5,1")


def _refuse_hub_kernels() -> None:
    """Hugging Face's distribution `kernels` would take the place of ours, or we of it."""
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    _fail(
        f"the Hugging Face package kernels {found} is installed in this environment and has the "
        "name of one of ours; give rtpurbo a virtual environment of its own"
    )


def _misused(message: str) -> NoReturn:
    """One line for the operator on a flag's value, exit code 2 as for any other misuse."""
    print(f"rtpurbo: {message}", file=sys.stderr)
    raise SystemExit(2)


def _fail(error: object) -> NoReturn:
    """One line for the operator, exit code 1."""
    print(f"rtpurbo: {error}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
