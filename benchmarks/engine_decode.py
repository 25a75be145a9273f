"""The engine's decode step beside the sum of its kernels' times. Run it with nothing else to do:

    python -m benchmarks.engine_decode [--streams 8] [--context 16384] [--steps 64] [--model DIR]

The embedded model by default, prompts of real Python code, greedy tokens, no wire. One JSON line:
the median step as the loop sees it, what scheduler and runner take of it, tokens per second, and on
a GPU how many kernels and copies a step has (`launches`) and what they take when their times are
added up (torch.profiler, in steps of their own, since profiling slows the host down).
`step_over_kernels` is what waiting costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.hardware import describe_hardware
from benchmarks.workload import code_prompt
from engine.batch import Batch
from engine.config import EngineConfig
from engine.embedded import embedded_model_path
from engine.loading import load_engine_parts
from engine.request import Request, SamplingParams
from engine.step import EngineParts, StepResult
from engine.tokenizer import Tokenizer
from engine.worker import ModelRunner

WARM_STEPS = 8
PROFILED_STEPS = 16
SHOWN_KERNELS = 16


class DecodeLoop:
    """Streams that decode together, with the engine's scheduler and runner, in this process."""

    def __init__(self, parts: EngineParts, prompts: list[list[int]], max_tokens: int) -> None:
        """Prefills all prompts; afterwards every step gives each stream a token.

        Args:
            max_tokens: of a stream, `stream_tokens` at least: the loop ends none.
        """
        self._parts = parts
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._requests = {i: Request(i, prompt, params) for i, prompt in enumerate(prompts)}
        for request in self._requests.values():
            parts.scheduler.add(request)
        while not all(request.output for request in self._requests.values()):
            self.step()

    def step(self) -> tuple[float, float]:
        """Seconds of a turn of the loop, and of the runner in it."""
        longest = max(self._requests.values(), key=lambda request: len(request.output))
        assert len(longest.output) < longest.params.max_tokens, "a stream has all its tokens"
        start = time.perf_counter()
        batch = self._parts.scheduler.schedule()
        before = time.perf_counter()
        result = self._parts.runner.start(batch, self._requests).finish()
        after = time.perf_counter()
        self._finish(batch, result)
        return time.perf_counter() - start, after - before

    def _finish(self, batch: Batch, result: StepResult) -> None:
        assert not result.failed, "values that are not finite"
        tokens = {i: sample.token for i, sample in result.samples.items()}
        self._parts.scheduler.update(batch, {i: t for i, t in tokens.items() if t is not None})


def stream_tokens(prompt_tokens: int, streams: int, steps: int, batch_tokens: int) -> int:
    """Tokens that a stream generates at most: the first ones decode while others are prefilled.

    Args:
        prompt_tokens: of all prompts together.
        batch_tokens: of one engine step, more than there are streams.
    """
    prefill_steps = -(-prompt_tokens // (batch_tokens - streams)) + 1
    return prefill_steps + WARM_STEPS + steps + PROFILED_STEPS


def measure(
    parts: EngineParts, prompts: list[list[int]], steps: int, max_tokens: int
) -> dict[str, Any]:
    """Figures of `steps` decode steps; times in milliseconds. `max_tokens` as in `DecodeLoop`."""
    assert isinstance(parts.runner, ModelRunner)
    on_gpu = parts.runner.info.device.startswith("cuda")
    loop = DecodeLoop(parts, prompts, max_tokens)
    for _ in range(WARM_STEPS):
        loop.step()
    times = [loop.step() for _ in range(steps)]
    turn, runner = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    figures: dict[str, Any] = {
        "decodes_with": parts.runner.decodes_with,
        "step_ms": round(turn, 4),
        "runner_ms": round(runner, 4),
        "tokens_per_second": round(len(prompts) / turn * 1e3, 1),
    }
    if on_gpu:
        total, launches, kernels = _kernel_times(loop)
        figures |= {
            "launches": round(launches, 2),
            "kernels_ms": round(total, 4),
            "step_over_kernels": round(turn / total, 3),
            "kernels": kernels,
        }
    return figures


def _kernel_times(loop: DecodeLoop) -> tuple[float, float, list[dict[str, Any]]]:
    """Milliseconds of all kernels and copies of a step, their number, and the longest by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            loop.step()
        torch.cuda.synchronize()
    micros: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            micros[event.name] += event.self_device_time_total
            calls[event.name] += 1
    longest = [
        {
            "name": name[:80],
            "calls": round(calls[name] / PROFILED_STEPS, 2),
            "ms": round(total / PROFILED_STEPS / 1e3, 5),
        }
        for name, total in micros.most_common(SHOWN_KERNELS)
    ]
    total = sum(micros.values()) / PROFILED_STEPS / 1e3
    return total, calls.total() / PROFILED_STEPS, longest


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--context", type=int, default=16384, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--model", type=Path, default=embedded_model_path())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "cuda", "torch"])
    parser.add_argument("--kernel-cache", help="folder of compiled kernels")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="of an engine step")
    parser.add_argument("--kv-cache-gib", type=float, help="both pools; default: as the engine")
    return parser.parse_args(arguments)


def engine_config(given: argparse.Namespace) -> tuple[EngineConfig, int]:
    """Settings of the engine, and the tokens that a stream may generate."""
    prompt_tokens = given.streams * given.context
    tokens = stream_tokens(prompt_tokens, given.streams, given.steps, given.max_batch_tokens)
    config = EngineConfig(
        model=str(given.model),
        device=given.device,
        dtype=given.dtype,
        kernels=given.kernels,
        kernel_cache=given.kernel_cache,
        cuda_graphs=not given.no_cuda_graphs,
        kv_cache_bytes=None if given.kv_cache_gib is None else int(given.kv_cache_gib * 2**30),
        max_num_seqs=given.streams,
        max_batch_tokens=given.max_batch_tokens,
        max_model_len=given.context + tokens,
    )
    return config, tokens


def main() -> None:
    given = parse()
    config, tokens = engine_config(given)
    tokenizer = Tokenizer.from_folder(given.model)
    prompts = [code_prompt(tokenizer, given.context, seed) for seed in range(given.streams)]
    parts = load_engine_parts(config)
    figures = measure(parts, prompts, given.steps, tokens)
    workload = {
        "streams": given.streams,
        "context": given.context,
        "steps": given.steps,
        "model": given.model.name,
        "dtype": parts.runner.info.dtype,
        "full_pages": parts.runner.info.full_pages,
    }
    print(json.dumps({**workload, **figures, "hardware": describe_hardware()}))


if __name__ == "__main__":
    main()
