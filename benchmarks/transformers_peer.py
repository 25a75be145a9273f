"""The peer of the serving benchmark: transformers' dense `generate`, in a process of its own.

Reads one JSON object from standard input (model, prompt, output_tokens, streams) and prints one
JSON line. Decoding with several streams starts from the cache of one prefill, repeated, because
the time of a dense decode step does not depend on what is in the cache.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    job = json.load(sys.stdin)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model.to(device).eval()
    prompt = torch.tensor([job["prompt"]], device=device)
    _generate(model, prompt[:, :256], 2)  # warm-up: allocators and kernel choice

    prefill, output = _timed(lambda: _generate(model, prompt, 1))
    decode = {}
    for streams in job["streams"]:
        decode[str(streams)] = _decode_rate(model, output, streams, job["output_tokens"])
    print(json.dumps({"prefill_seconds": prefill, "decode_tokens_per_second": decode}))


def _generate(model: Any, ids: torch.Tensor, tokens: int, cache: Any = None) -> Any:
    """Greedy `generate` of exactly `tokens` tokens; returns transformers' output object."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )


def _decode_rate(model: Any, prefilled: Any, streams: int, tokens: int) -> float:
    """Tokens per second of all streams together, from two runs that differ in length."""
    ids = prefilled.sequences.repeat(streams, 1)
    short, _ = _timed(lambda: _generate(model, ids, 2, _repeat(prefilled, streams)))
    long, _ = _timed(lambda: _generate(model, ids, 2 + tokens, _repeat(prefilled, streams)))
    return streams * tokens / (long - short)


def _repeat(prefilled: Any, streams: int) -> DynamicCache:
    """A fresh copy of the prefilled cache for `streams` sequences."""
    import copy

    cache: DynamicCache = copy.deepcopy(prefilled.past_key_values)
    cache.batch_repeat_interleave(streams)
    return cache


def _timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
