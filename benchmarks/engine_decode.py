"""The engine's decode step beside the sum of its kernels' times. Run it with nothing else to do:

    python -m benchmarks.engine_decode [--streams 8] [--context 16384] [--steps 64] [--model DIR]

The embedded model by default, prompts of real Python code, greedy tokens, the engine's loop without
a wire. One JSON line: the median turn of the loop, which reads one step and tells of it
(`step_ms`), and tokens per second. On a GPU, where steps are started before the one before is read,
the same step by step as well; and how many kernels and copies a step has (`launches`) and what they
take when their times are added up (torch.profiler, in steps of their own, since profiling slows the
host down). `step_over_kernels` is what waiting costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.hardware import describe_hardware
from benchmarks.workload import code_prompt
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.embedded import embedded_model_path
from engine.loading import load_engine_parts
from engine.messages import Abort, Add, FromEngine, Report, ToEngine
from engine.request import SamplingParams
from engine.step import EngineParts
from engine.tokenizer import Tokenizer
from engine.worker import ModelRunner

WARM_STEPS = 8
PROFILED_STEPS = 16
SHOWN_KERNELS = 16


class Prompts:
    """Implements `engine.core.Channel`: hands requests over, and looks at what is told of them."""

    def __init__(self, prompts: list[list[int]], max_tokens: int, first_id: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.told = dict.fromkeys(range(first_id, first_id + len(prompts)), 0)  # tokens of each
        self._inbox: list[ToEngine] = [
            Add(request_id=i, params=params, prompt=array("i", prompt).tobytes(), arrival=0.0)
            for i, prompt in zip(self.told, prompts, strict=True)
        ]

    def leave(self) -> None:
        """The next turn ends all requests."""
        self._inbox.append(Abort(list(self.told)))

    def receive(self, timeout: float) -> list[ToEngine]:
        messages, self._inbox = self._inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        assert isinstance(message, Report)
        for update in message.updates:
            assert update.finish_reason is None, "a stream has all its tokens"
            self.told[update.request_id] += len(update.tokens)


class DecodeLoop:
    """Streams that decode together in the engine's own loop, in this process."""

    def __init__(
        self,
        parts: EngineParts,
        prompts: list[list[int]],
        max_tokens: int,
        *,
        look_ahead: bool,
        first_id: int = 0,
    ) -> None:
        """Prefills all prompts; afterwards every step gives each stream a token.

        Args:
            max_tokens: of a stream, `stream_tokens` at least: the loop ends none.
            look_ahead: start steps before the one before is read.
            first_id: of the requests, all of which are new to the parts.
        """
        self._channel = Prompts(prompts, max_tokens, first_id)
        self._core = EngineCore(parts.scheduler, parts.runner, self._channel, look_ahead=look_ahead)
        while not all(self._channel.told.values()):
            self._core.turn()

    def step(self) -> float:
        """Seconds of a turn of the loop."""
        before = sum(self._channel.told.values())
        start = time.perf_counter()
        self._core.turn()
        seconds = time.perf_counter() - start
        assert sum(self._channel.told.values()) == before + len(self._channel.told)
        return seconds

    def median_ms(self, steps: int) -> float:
        """Of a turn, after some that are not counted."""
        for _ in range(WARM_STEPS):
            self.step()
        return statistics.median(self.step() for _ in range(steps)) * 1e3

    def end(self) -> None:
        """Give everything back."""
        self._channel.leave()
        self._core.turn()


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
    ahead: dict[str, Any] = {}
    if parts.runner.overlaps:
        loop = DecodeLoop(parts, prompts, max_tokens, look_ahead=True, first_id=len(prompts))
        ahead = _speed(loop.median_ms(steps), len(prompts))
        loop.end()
    loop = DecodeLoop(parts, prompts, max_tokens, look_ahead=False)
    serial = _speed(loop.median_ms(steps), len(prompts))
    figures: dict[str, Any] = {"decodes_with": parts.runner.decodes_with}
    kernels: dict[str, Any] = {}
    if parts.runner.info.device.startswith("cuda"):
        total, launches, longest = _kernel_times(loop)
        kernels = {"launches": round(launches, 2), "kernels_ms": round(total, 4)}
        for found in (ahead, serial):
            if found:
                found["step_over_kernels"] = round(found["step_ms"] / total, 3)
        kernels["kernels"] = longest
    loop.end()
    if ahead:
        return figures | ahead | {"step_by_step": serial} | kernels
    return figures | serial | kernels


def _speed(step_ms: float, streams: int) -> dict[str, Any]:
    return {
        "step_ms": round(step_ms, 4),
        "tokens_per_second": round(streams / step_ms * 1e3, 4),
    }


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
