"""`rtpurbo serve`: flags become settings, settings a server."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.commands.failure import fail
from server.commands.options import ModelArgument


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
    index_dtype: Annotated[
        Literal["auto", "int8"] | None,
        typer.Option(help="Of index keys; int8: with a scale per token; auto: as keys and values."),
    ] = None,
    kernels: Annotated[
        Literal["auto", "cuda", "torch"] | None,
        typer.Option(help="Of attention; auto: cuda where they can be had, else torch."),
    ] = None,
    kernel_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of compiled kernels; default: ~/.cache/rtpurbo/kernels."),
    ] = None,
    cuda_graphs: Annotated[
        bool | None, typer.Option(help="Record decode steps and replay them (with CUDA kernels).")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and output together, in tokens.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences computed together.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one engine step; prefill is cut to fit.")
    ] = None,
    max_step_ms: Annotated[
        float | None,
        typer.Option(
            help="Longest step in ms while others wait for tokens; default 100 on a GPU, 400 on a "
            "CPU; 0: no limit."
        ),
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
    log_format: Annotated[
        Literal["auto", "json", "text"] | None,
        typer.Option(help="Of the lines on stdout; auto: text on a terminal, else JSON."),
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
        "index_dtype": index_dtype,
        "kernels": kernels,
        "kernel_cache": kernel_cache,
        "cuda_graphs": cuda_graphs,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_batch_tokens": max_batch_tokens,
        "max_step_ms": max_step_ms,
        "kv_cache_gib": kv_cache_gib,
        "prefix_caching": prefix_caching,
        "cache_generated": cache_generated,
        "log_format": log_format,
        "threads": threads,
    }
    try:
        config = ServerConfig.resolve(_given(flags), embedded_model_path())
        raise typer.Exit(run_server(config))
    except EngineError as error:
        fail(error)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that stand on the command line; the others are left to the environment."""
    return {name: value for name, value in flags.items() if value is not None}


def _refuse_hub_kernels() -> None:
    """Hugging Face's distribution `kernels` would take the place of ours, or we of it."""
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    fail(
        f"the Hugging Face package kernels {found} is installed in this environment and has the "
        "name of one of ours; give rtpurbo a virtual environment of its own"
    )
