"""Speed of the prefill kernels: one JSON line for each tile configuration, best last.

    python -m benchmarks.prefill_sweep [--tokens 65536] [--window 8192] [--dim 128]

A layer of Qwen3-30B-A3B: its 27 local query heads over 4 KV heads, bfloat16, pages of 64, a whole
prompt. TFLOP/s count the pairs of query and key that are not masked. A window as long as the prompt
is causal attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.attention_prefill import PrefillCase
from benchmarks.device_times import milliseconds
from benchmarks.hardware import describe_hardware
from kernels import cuda_prefill
from kernels._build import KernelBuildError, default_cache, find_library
from kernels._launch import KernelError, KernelLibrary
from kernels.prefill_triton import SWEEP, attend_spans

Launch = Callable[[], None]


def launches(case: PrefillCase, window: int) -> Iterator[tuple[dict[str, Any], Launch]]:
    """What is timed, each with its description."""
    args = (case.spans_of(case.local_G), window, case.sinks, case.scale)
    for config in SWEEP:
        yield {"kernel": "triton"} | config._asdict(), partial(attend_spans, *args, config)
    try:
        library = KernelLibrary(find_library(default_cache()))
    except (KernelBuildError, KernelError) as error:
        print(json.dumps({"kernel": "cuda", "error": str(error)}))
        return
    yield {"kernel": "cuda"}, partial(cuda_prefill.attend_spans, library, *args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    print(json.dumps(describe_hardware()))
    case = PrefillCase.make(options.tokens, dim=options.dim)
    work = case.flops(len(case.local_G), options.window)
    found = []
    for what, launch in launches(case, options.window):
        try:
            took = statistics.median(milliseconds(launch, repeats=5))
        except Exception as error:  # a configuration that the chip refuses must not end the sweep
            print(json.dumps(what | {"error": str(error).splitlines()[0]}))
            continue
        found.append({"teraflops": round(work / took / 1e9, 1), "milliseconds": took} | what)
    for record in sorted(found, key=lambda record: record["teraflops"]):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
