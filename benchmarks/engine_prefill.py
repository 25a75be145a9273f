"""Seconds to the first token of one long prompt, in the engine and in transformers:

    python -m benchmarks.engine_prefill [--layers 4] [--context 32768,131072] [--chunk 8192]
    python -m benchmarks.engine_prefill --model DIR --context 32000

Without a model: random weights in the shapes of Qwen3-30B-A3B's layers, the eight experts of a
token as one MLP. Random tokens, bfloat16 on a GPU, no wire, no prefix cache, the best run.

    sparse        the converted model, windowed local heads, retrieval heads dense
    sparse_tiles  the same with --prefill-attention sparse
    dense         the same weights with full attention in all heads, on the engine's kernels
    ops           as sparse, on the PyTorch ops
    flash, cudnn  transformers with that kernel of scaled_dot_product_attention, in one piece

One JSON line: seconds by context and variant, and how many times faster sparse is than each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.hardware import describe_hardware
from benchmarks.random_model import layer_shapes, write_random_model
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.loading import load_engine_parts
from engine.model.config_reader import read_config
from engine.request import Request, SamplingParams
from engine.step import EngineParts
from engine.worker import ModelRunner

ENGINES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "sparse_tiles": {"prefill_attention": "sparse"},
    "dense": {"attention": "dense"},
    "ops": {"kernels": "torch"},
}
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Prefill = Callable[[list[int]], float]


def engine_seconds(parts: EngineParts, prompt: list[int]) -> float:
    """From the arrival of a prompt at the scheduler to its first token on the host."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    request = Request(0, prompt, params)
    start = time.perf_counter()
    parts.scheduler.add(request)
    while not request.output:
        batch = parts.scheduler.schedule()
        result = parts.runner.start(batch, {0: request}).finish()
        assert not result.failed, "values that are not finite"
        tokens = {i: sample.token for i, sample in result.samples.items()}
        parts.scheduler.update(batch, {i: t for i, t in tokens.items() if t is not None})
    seconds = time.perf_counter() - start
    parts.scheduler.finish(0)
    parts.runner.forget(0)
    return seconds


def engine_of(given: argparse.Namespace, folder: Path, variant: str, longest: int) -> EngineParts:
    """The engine of a variant, with room for one prompt."""
    config = EngineConfig(
        model=str(folder),
        device=given.device,
        kernel_cache=given.kernel_cache,
        max_model_len=longest + 1,
        max_num_seqs=1,
        max_batch_tokens=given.chunk,
        kv_cache_bytes=int(given.kv_cache_gib * 2**30),
        prefix_caching=False,
        cuda_graphs=False,
        **ENGINES[variant],
    )
    return load_engine_parts(config)


def peer_of(folder: Path, device: str, backend: SDPBackend, stack: ExitStack) -> Prefill:
    """transformers' forward pass over a whole prompt, with its cache and the last logits."""
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(sdpa_kernel(backend))

    def prefill(prompt: list[int]) -> float:
        start = time.perf_counter()
        ids = torch.tensor([prompt], device=device)
        logits = model(ids, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return time.perf_counter() - start

    return prefill


def fastest(prefill: Prefill, contexts: Sequence[int], vocab: int, repeats: int) -> dict[str, Any]:
    """Seconds of each context, by its length; what failed has its reason in place of them."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for context in contexts:
        prompts: list[list[int]] = torch.randint(
            1, vocab, (repeats + 1, context), generator=generator
        ).tolist()
        try:
            found[str(context)] = round(min([prefill(prompt) for prompt in prompts][1:]), 5)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found[str(context)] = str(error).splitlines()[0][:160]
            break
    return found


def measured(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant and its seconds."""
    contexts = [int(part) for part in given.context.split(",")]
    vocab = read_config(folder).vocab_size
    for variant in given.variants.split(","):
        with ExitStack() as stack:
            if variant in PEERS:
                prefill = peer_of(folder, given.device, PEERS[variant], stack)
            else:
                try:
                    parts = engine_of(given, folder, variant, max(contexts))
                except ConfigError as error:
                    yield variant, {"refused": str(error)}
                    continue
                assert isinstance(parts.runner, ModelRunner)
                yield f"{variant}_runs_on", {"prefill": parts.runner.prefills_with}
                prefill = partial(engine_seconds, parts)
            yield variant, fastest(prefill, contexts, vocab, given.repeats)


def times_faster(seconds: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of each variant over those of `sparse`, by context, where both are numbers."""
    own = seconds.get("sparse", {})
    return {
        name: {
            context: round(value / own[context], 3)
            for context, value in found.items()
            if isinstance(value, float) and isinstance(own.get(context), float)
        }
        for name, found in seconds.items()
        if name != "sparse" and not name.endswith("_runs_on")
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; default: random weights")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--context", default="32768,131072", help="tokens, one or several")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of an engine step")
    parser.add_argument("--variants", default="sparse,dense,flash,cudnn")
    parser.add_argument("--repeats", type=int, default=2, help="runs after a warm one")
    parser.add_argument("--kv-cache-gib", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel-cache", help="folder of compiled kernels")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = given.model
        if folder is None:
            longest = max(int(part) for part in given.context.split(","))
            shapes = layer_shapes(given.layers, longest + 64)
            folder = write_random_model(Path(name) / "random", shapes, given.device)
        seconds = dict(measured(given, folder))
    workload = {"model": "random" if given.model is None else given.model.name}
    if given.model is None:
        workload["layers"] = given.layers
    figures = {"chunk": given.chunk, "seconds": seconds, "times_faster": times_faster(seconds)}
    return {"benchmark": "engine_prefill", **workload, **figures, "hardware": describe_hardware()}


if __name__ == "__main__":
    print(json.dumps(run(parse())))
