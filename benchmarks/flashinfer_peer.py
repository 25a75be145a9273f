"""FlashInfer (extra `flashinfer`) as a peer of the attention benchmarks; they do without it.

Prefill: its FlashAttention-3 kernels for Hopper over pages, causal, of the whole prompt or of a
window, which has no sinks. Decode: its batch decode over pages on tensor cores, for which the query
heads of a KV head are rows of one product. The library itself chooses the FlashAttention-2 template
there, whose plan splits a context among CTAs; its FlashAttention-3 template does not split.

`plan` runs on the host and is outside of what is timed, as is the compiling of three modules that
the first use on a host needs (nvcc, ninja and some minutes of cores; no network). They are kept in
`$FLASHINFER_WORKSPACE_BASE/.cache/flashinfer` (the home folder unless that is set), where ninja in
every later process finds nothing left to do:

    python -m benchmarks.flashinfer_peer    builds them, checks the answers, ends with a JSON line

Before it is timed, what it answers is compared with attention in float32.

API and modules as in 0.6.8.post1 (flashinfer/decode.py, prefill.py, jit/core.py).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_layer import BLOCK, DIM, HEADS, KV_HEADS
from benchmarks.peer_check import PeerError, compare

WORKSPACE_BYTES = 2**27  # what its documentation recommends
LAYOUT = "HND"  # pages as ours: heads, then tokens
CHECKED_TOKENS, CHECKED_WINDOW, CHECKED_ROWS = 5 * BLOCK, 2 * BLOCK + 1, 3
FULL, WINDOWED = ("fa3", False), ("fa3", True)  # template, and whether it masks a window
DECODE = ("fa2", False)

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class FlashInfer:
    """The imported library, with its modules built."""

    module: Any
    device: torch.device
    build_seconds: float
    name: str = "flashinfer"

    @classmethod
    def make(cls, device: torch.device | None = None) -> FlashInfer:
        """Import, build and check.

        Raises:
            PeerError: not installed, no compiler, a build that failed, or answers that are not
                those of attention.
        """
        start = time.monotonic()
        try:
            module = import_module("flashinfer")
            _build()
            peer = cls(module, device or torch.device("cuda"), time.monotonic() - start)
            peer.check()
        except PeerError:
            raise
        except Exception as error:  # imports, compilers and launches of a library fail as they like
            raise PeerError(_one_line(error)) from error
        return peer

    def facts(self) -> dict[str, Any]:
        """For the JSON of a benchmark."""
        return {"version": self.module.__version__, "build_seconds": round(self.build_seconds, 1)}

    def decode_calls(
        self, q_RHD: Tensor, caches: Sequence[tuple[Tensor, Tensor]], pages_RB: Tensor
    ) -> list[Call]:
        """A dense decode step of each layer, for one CUDA graph; they share a plan.

        Args:
            q_RHD: [rows, heads, head_dim] bfloat16.
            caches: keys and values of each layer, [pages, KV heads, block, head_dim].
            pages_RB: pages of each row, all full.
        """
        rows, blocks = pages_RB.shape
        indptr = self._int32(torch.arange(rows + 1) * blocks)
        indices = self._int32(pages_RB.flatten())
        last = self._int32(torch.full((rows,), BLOCK))
        wrapper = self.module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace(),
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty_like(indptr),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last),
        )
        shape = (q_RHD.shape[1], caches[0][0].shape[1], q_RHD.shape[2], BLOCK)
        wrapper.plan(indptr, indices, last, *shape, q_data_type=q_RHD.dtype)
        out = torch.empty_like(q_RHD)

        def call(cache: tuple[Tensor, Tensor]) -> Call:
            return lambda: wrapper.run(q_RHD, cache, out=out)

        return [call(cache) for cache in caches]

    def prefill_call(
        self,
        q_THD: Tensor,
        out_THD: Tensor,
        cache: tuple[Tensor, Tensor],
        pages_B: Tensor,
        window: int | None = None,
    ) -> Call:
        """Causal attention of one whole prompt; its heads come in equal groups.

        Args:
            pages_B: of the prompt, as many as it needs.
            window: tokens that a query sees, itself included; None: all before it.
        """
        tokens, heads, dim = q_THD.shape
        blocks = -(-tokens // BLOCK)
        wrapper = self.module.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace(), LAYOUT, backend="fa3"
        )
        wrapper.plan(
            self._int32(torch.tensor([0, tokens])),
            self._int32(torch.tensor([0, blocks])),
            self._int32(pages_B[:blocks]),
            self._int32(torch.tensor([tokens - (blocks - 1) * BLOCK])),
            heads,
            cache[0].shape[1],
            dim,
            BLOCK,
            causal=True,
            window_left=-1 if window is None else window - 1,
            q_data_type=q_THD.dtype,
        )
        return lambda: wrapper.run(q_THD, cache, out=out_THD)

    def check(self) -> None:
        """Raises PeerError where an answer is not that of attention in float32."""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16)

        pages, blocks = CHECKED_ROWS * CHECKED_TOKENS // BLOCK, CHECKED_TOKENS // BLOCK
        cache = (random(pages, KV_HEADS, BLOCK, DIM), random(pages, KV_HEADS, BLOCK, DIM))
        order = torch.randperm(pages, generator=generator, device=self.device)
        pages_RB = order.view(CHECKED_ROWS, blocks)
        q_RHD = random(CHECKED_ROWS, HEADS, DIM)
        (call,) = self.decode_calls(q_RHD, [cache], pages_RB)
        found = call()
        assert isinstance(found, Tensor)
        k_RNCD, v_RNCD = (part[pages_RB].transpose(1, 2).flatten(2, 3) for part in cache)
        compare("decode", found[:, :, None], q_RHD[:, :, None], k_RNCD, v_RNCD)
        tokens = CHECKED_TOKENS - 5
        q_THD = random(tokens, HEADS, DIM)
        k_1NCD, v_1NCD = (part[:1, :, :tokens] for part in (k_RNCD, v_RNCD))
        for window in (None, CHECKED_WINDOW):
            out = torch.full_like(q_THD, math.nan)
            self.prefill_call(q_THD, out, cache, pages_RB[0], window)()
            age = torch.arange(tokens, device=self.device)
            age = age[:, None] - age
            seen = (age >= 0) & (age < (window or tokens))
            what = "prefill" if window is None else "windowed prefill"
            compare(what, _heads_first(out), _heads_first(q_THD), k_1NCD, v_1NCD, seen)

    def _workspace(self) -> Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)

    def _int32(self, values: Tensor) -> Tensor:
        return values.to(device=self.device, dtype=torch.int32)


def _build() -> None:
    """Compile what will be used, all at once: left alone, each module waits for its first use.

    Each by its own `build`, as at its first use. `jit.build_jit_specs` runs ninja in another folder
    and so with other records of what is up to date: what either has built the other builds anew.
    """
    jit, bf16 = import_module("flashinfer.jit"), torch.bfloat16
    dtypes = (bf16, bf16, bf16, torch.int32)
    specs = [
        jit.gen_batch_prefill_module(template, *dtypes, DIM, DIM, 0, windowed, False, False)
        for template, windowed in (FULL, WINDOWED, DECODE)
    ]
    wanted = [spec for spec in specs if not spec.is_aot]  # others came with the library
    with ThreadPoolExecutor(len(specs)) as beside:
        list(beside.map(lambda spec: spec.build(verbose=False), wanted))


def _one_line(error: Exception) -> str:
    """Its first line and, where a compiler's output follows, the first that names an error."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    cause = [line for line in more if "error" in line.lower()][:1]
    return " ".join([f"{type(error).__name__}:", first, *cause])[:400]


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1)[None]


def main() -> None:
    if find_spec("flashinfer") is None:
        facts: dict[str, Any] = {"not_measured": "flashinfer is not installed"}
    else:
        try:
            facts = FlashInfer.make().facts()
        except PeerError as error:
            sys.exit(f"flashinfer: {error}")
    print(json.dumps({"benchmark": "flashinfer_build", **facts}))


if __name__ == "__main__":
    main()
