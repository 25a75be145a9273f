"""Speed of the prefill kernel by tile configuration: one JSON line each, best last.

    python -m benchmarks.prefill_sweep [--tokens 65536] [--window 8192] [--dim 128]

A layer of Qwen3-30B-A3B: its 27 local query heads over 4 KV heads, bfloat16, pages of 64, one whole
prompt. TFLOP/s count the pairs of query and key that are not masked.
"""

from __future__ import annotations

import argparse
import json
import statistics

from benchmarks.attention_prefill import PrefillCase, milliseconds
from benchmarks.hardware import describe_hardware
from kernels.prefill_triton import SWEEP, TileConfig, attend_spans


def teraflops(case: PrefillCase, config: TileConfig, window: int) -> float:
    """Of one configuration: the median of 5 launches."""

    def launch() -> None:
        attend_spans(case.spans_of(case.local_G), window, case.sinks, case.scale, config)

    took = statistics.median(milliseconds(launch, repeats=5))
    return case.flops(len(case.local_G), window) / took / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    print(json.dumps(describe_hardware()))
    case = PrefillCase.make(options.tokens, dim=options.dim)
    found = [(teraflops(case, config, options.window), config) for config in SWEEP]
    for speed, config in sorted(found):
        print(json.dumps({"teraflops": round(speed, 1)} | config._asdict()))


if __name__ == "__main__":
    main()
