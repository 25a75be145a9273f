"""`rtpurbo convert`: flags become the options of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.commands.failure import fail
from server.commands.options import DeviceOption


def convert(
    model: Annotated[Path, typer.Argument(help="Folder of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Text file or folder; default: Python sources of this environment."),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="Take the retrieval_heads of this heads.json, and choose none."),
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
        bool, typer.Option(help="Choose by the retrieval that is lost, not by score alone.")
    ] = False,
    window_tokens: Annotated[int, typer.Option(help="Window of the local heads.")] = 8192,
    sink_tokens: Annotated[int, typer.Option(help="First tokens that all heads see.")] = 4,
    index_dim: Annotated[int, typer.Option(help="Dimensions of the index.")] = 16,
    index_scope: Annotated[
        Literal["query_head", "kv_head"], typer.Option(help="Index keys per query or KV head.")
    ] = "query_head",
    index_age_bias: Annotated[
        bool, typer.Option(help="Give every head's index a bias for the age of blocks.")
    ] = True,
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
    age_tokens: Annotated[
        int,
        typer.Option(help="Longer documents for the index's biases of old ages; 0: the fit's do."),
    ] = 0,
    keep_far: Annotated[
        bool, typer.Option(help="Keep --top-p of the rows in which a head looks far, too.")
    ] = True,
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
    distil_sequences: Annotated[
        int, typer.Option(help="Sequences trained on; they come again when all had their turn.")
    ] = 1024,
    distil_facts_share: Annotated[
        float, typer.Option(help="Share of them that ends in questions about planted facts.")
    ] = 0.5,
    distil_steps: Annotated[int, typer.Option(help="Optimizer steps at most.")] = 600,
    distil_batch: Annotated[int, typer.Option(help="Sequences of an optimizer step.")] = 8,
    distil_learning_rate: Annotated[
        float, typer.Option(help="Of distillation; small models bear more, about 1e-4.")
    ] = 3e-6,
    distil_cooldown_steps: Annotated[
        int,
        typer.Option(
            help="Last steps, in which its learning rate falls to nothing; they come early where "
            "the gap to the teacher no longer shrinks."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of documents, needles and samples.")] = 0,
    device: DeviceOption = "cpu",
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
                sequences=distil_sequences,
                facts_share=distil_facts_share,
                steps=distil_steps,
                batch=distil_batch,
                learning_rate=distil_learning_rate,
                cooldown_steps=distil_cooldown_steps,
                seed=seed,
                device=device,
            )
        options = ConvertOptions(
            data=data,
            heads=heads,
            heads_share=heads_share,
            heads_mass=heads_mass,
            max_kv_heads=max_kv_heads,
            window_tokens=window_tokens,
            sink_tokens=sink_tokens,
            index_dim=index_dim,
            index_scope=index_scope,
            index_age_bias=index_age_bias,
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
                age_tokens=age_tokens,
                keep_far=keep_far,
                adaptive_top_p=adaptive_top_p,
            ),
            distil=training,
            seed=seed,
            device=device,
        )
        run_conversion(model, out, options, Console(stderr=True))
    except EngineError as error:
        fail(error)
