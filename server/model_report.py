"""What `rtpurbo inspect` shows of a folder: head map, KV bytes, memory plan. Torch-free."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory_plan import CUDA_SHARE, MemoryPlan, plan_memory
from engine.model.byte_size import shown_bytes
from engine.model.checkpoint import Checkpoint, preflight
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import IndexDtype, block_tokens_of, dense_token_bytes, page_bytes

BFLOAT16_BYTES = 2
RETRIEVAL, LOCAL_ON_FULL, LOCAL = "#", "+", "."


def device_plan(
    checkpoint: Checkpoint, device_bytes: int, index_dtype: IndexDtype = "auto"
) -> MemoryPlan:
    """How `serve` would divide a GPU of so many bytes, with its default settings, in bfloat16.

    Raises:
        ConfigError: the weights, or one request, do not fit.
    """
    weights = checkpoint.weight_count * BFLOAT16_BYTES
    if weights >= device_bytes:
        raise ConfigError(f"the weights take {weights:,} bytes, the device has {device_bytes:,}")
    defaults = EngineConfig(model=str(checkpoint.folder))
    return plan_memory(
        checkpoint.config,
        item_bytes=BFLOAT16_BYTES,
        weight_bytes=weights,
        cache_bytes=int(CUDA_SHARE * (device_bytes - weights)),
        max_model_len=None,
        max_num_seqs=defaults.max_num_seqs,
        max_batch_tokens=defaults.max_batch_tokens,
        block_tokens=block_tokens_of(checkpoint.config),
        index_dtype=index_dtype,
    )


def model_report(
    folder: Path, device_bytes: int, index_dtype: IndexDtype = "auto"
) -> dict[str, Any]:
    """Facts about a folder, ready for JSON, and the memory plan for a GPU of so many bytes.

    Raises:
        CheckpointError: one line that names the file.
        ConfigError: the device is too small.
    """
    checkpoint = preflight(folder)
    plan = device_plan(checkpoint, device_bytes, index_dtype)
    return _facts(checkpoint, plan, device_bytes, index_dtype)


def _facts(
    checkpoint: Checkpoint, plan: MemoryPlan, device_bytes: int, index_dtype: IndexDtype
) -> dict[str, Any]:
    config, sparse = checkpoint.config, checkpoint.config.sparse
    heads = model_heads(config)
    elements, _ = page_bytes(config, item_bytes=1, block_tokens=1)
    return {
        "model": checkpoint.folder.resolve().name,
        "family": config.family,
        "layers": config.num_layers,
        "query_heads": config.num_layers * config.num_heads,
        "kv_heads": config.num_layers * config.num_kv_heads,
        "retrieval_heads": [list(layer.retrieval) for layer in heads],
        "full_kv_heads": [list(layer.full_kv) for layer in heads],
        "attention": "dense" if sparse is None else "sparse",
        "window_tokens": None if sparse is None else sparse.window_tokens,
        "sink_tokens": None if sparse is None else sparse.sink_tokens,
        "index_dim": None if sparse is None else sparse.index_dim,
        "index_age_bias": None if sparse is None else sparse.index_age_bias,
        "index_dtype": "bfloat16" if index_dtype == "auto" else index_dtype,
        "dense_below": None if sparse is None else sparse.dense_below,
        "max_position_embeddings": config.max_position_embeddings,
        "weight_bytes": checkpoint.weight_bytes,
        "kv_elements_per_token": elements,
        "kv_elements_per_token_dense": dense_token_bytes(config, item_bytes=1),
        "memory_plan": {
            "device_bytes": device_bytes,
            **asdict(plan),
            "tokens": plan.tokens,
            "tokens_dense": plan.tokens_dense,
        },
    }


def render_head_map(report: dict[str, Any], heads_per_layer: int, group: int) -> str:
    """Layers down, query heads across; a space between the groups of a KV head."""
    lines = [
        f"{RETRIEVAL} retrieval   {LOCAL_ON_FULL} local, KV kept whole   {LOCAL} local, windowed"
    ]
    for layer, retrieval in enumerate(report["retrieval_heads"]):
        full = set(report["full_kv_heads"][layer])
        row = ""
        for head in range(heads_per_layer):
            row += " " if head and head % group == 0 else ""
            row += (
                RETRIEVAL
                if head in retrieval
                else LOCAL_ON_FULL
                if head // group in full
                else LOCAL
            )
        lines.append(f"{layer:>4}  {row}")
    return "\n".join(lines)


def render_report(folder: Path, device_bytes: int, index_dtype: IndexDtype = "auto") -> str:
    """The report for people; raises as `model_report`."""
    checkpoint = preflight(folder)
    plan = device_plan(checkpoint, device_bytes, index_dtype)
    report = _facts(checkpoint, plan, device_bytes, index_dtype)
    chosen = sum(len(layer) for layer in report["retrieval_heads"])
    total = report["query_heads"]
    sparse, dense = plan.bytes_per_token, plan.bytes_per_token_dense
    saving = dense / max(sparse, 1)
    facts = {
        "model": f"{report['model']} ({report['family']}, {report['attention']} attention)",
        "retrieval heads": f"{chosen} of {total} ({chosen / total:.1%})",
        "KV per token": f"{sparse:,} B in bfloat16, dense {dense:,} B ({saving:.1f}x)",
        "weights": shown_bytes(report["weight_bytes"]),
        "context": f"{report['max_position_embeddings']:,} tokens",
    }
    if report["attention"] == "sparse":
        facts["window"] = f"{report['window_tokens']:,} tokens and {report['sink_tokens']} sinks"
        facts["indexer"] = (
            "none: retrieval heads decode densely"
            if report["index_dim"] is None
            else f"{report['index_dim']} dimensions in {report['index_dtype']}, "
            f"{'a bias by age, ' if report['index_age_bias'] else ''}"
            f"dense below {report['dense_below']:,} tokens"
        )
    lines = [f"{name:>16}  {value}" for name, value in facts.items()]
    config = checkpoint.config
    head_map = render_head_map(report, config.num_heads, config.group_size)
    title = f"memory plan for a GPU of {shown_bytes(device_bytes)} in bfloat16"
    return "\n".join([*lines, "", head_map, "", title, plan.render()])


def plot_head_map(folder: Path, file: Path) -> None:
    """The head map as a picture; needs matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib.figure

    checkpoint = preflight(folder)
    config, layers = checkpoint.config, model_heads(checkpoint.config)
    grid = [[0.0] * config.num_heads for _ in range(config.num_layers)]
    for layer, roles in enumerate(layers):
        for head in range(config.num_heads):
            kept = head // config.group_size in roles.full_kv
            grid[layer][head] = 1.0 if head in roles.retrieval else 0.4 if kept else 0.0
    size = (max(4.0, config.num_heads / 4), max(3.0, config.num_layers / 4))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="query head",
        ylabel="layer",
        title=f"{folder.resolve().name}: retrieval heads (dark), local heads on kept KV (light)",
    )
    figure.savefig(file, dpi=120)
