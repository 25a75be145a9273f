"""Drives PagedAttention by hand: random queries, keys and values, shuffled pages, NaN everywhere
else.

Legend: n tokens of a sequence, H query heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch, Rule, Span
from engine.model.attention import PagedAttention
from engine.model.attention_layers import AttentionLayers, PrefillMode
from engine.model.batch_tensors import BatchTensors
from engine.model.config import ModelConfig
from engine.model.decode_kernels import DecodeKernels
from engine.model.head_layout import model_heads
from engine.model.kv_bytes import IndexDtype, block_tokens_of
from engine.model.kv_cache import KVCache
from engine.model.prefill_kernels import SpanKernels
from engine.request import Request, SamplingParams
from kernels._launch import KernelLibrary
from tests.engine.head_map_model import random_indexers
from tests.engine.naive_attention import NaiveAttention, PagedSequence

Take = tuple[int, int, Rule]  # sequence, number of tokens, rule


class Driver:
    """A few sequences over one cache of tiny pages."""

    def __init__(
        self,
        model: ModelConfig,
        lengths: Sequence[tuple[int, int]],
        *,
        top_p: Sequence[float | None] | None = None,
        seed: int = 0,
        library: KernelLibrary | None = None,
        prefill_kernels: SpanKernels | None = None,
        prefill_attention: PrefillMode = "dense",
        prompt_tokens: int = 1,
        index_dtype: IndexDtype = "auto",
    ) -> None:
        """
        Args:
            lengths: prompt and total tokens of each.
            library: for decode rows, and `prefill_kernels` for prompts; None: the PyTorch ops.
            prompt_tokens: that requests claim: their last 128 are read densely in any prefill.
        """
        self.model = model
        self.index_dtype = index_dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.block = block_tokens_of(model)
        self.heads = model_heads(model)
        self.indexers = random_indexers(model, self.generator)
        self.has_full = any(heads.full_kv for heads in self.heads)
        self.has_window = any(heads.windowed_kv for heads in self.heads)
        own = top_p or [None] * len(lengths)
        self.sequences = [
            self._sequence(prompt, total, p)
            for (prompt, total), p in zip(lengths, own, strict=True)
        ]
        pages = sum(-(-total // self.block) for _, total in lengths) + 3
        self.cache = KVCache(
            model,
            block_tokens=self.block,
            full_pages=pages if self.has_full else 0,
            window_pages=pages if self.has_window else 0,
            dtype=torch.float32,
            device=torch.device("cpu"),
            index_dtype=index_dtype,
        )
        for layer in self.cache.layers:
            for tensor in layer.full_tensors + layer.window_tensors:
                tensor.fill_(poison_of(tensor))
        self.free_full = (torch.randperm(pages, generator=self.generator) + 1).tolist()
        self.free_window = (torch.randperm(pages, generator=self.generator) + 1).tolist()
        self.tensors = BatchTensors(
            max_num_seqs=len(lengths),
            max_blocks=-(-256 // self.block),
            block_tokens=self.block,
            device=torch.device("cpu"),
        )
        kernels = None
        if library is not None:
            kernels = DecodeKernels(
                library,
                model,
                torch.device("cpu"),
                torch.float32,
                max_rows=len(lengths),
                max_blocks=-(-256 // self.block),
            )
        self.layers = AttentionLayers(
            model,
            self.cache,
            self.indexers,
            torch.device("cpu"),
            prefill_attention=prefill_attention,
            kernels=kernels,
            prefill_kernels=prefill_kernels,
        )
        self.prompt_tokens = prompt_tokens
        self.newest: PagedAttention | None = None

    def _sequence(self, prompt: int, total: int, top_p: float | None) -> PagedSequence:
        model = self.model
        q_shape = (model.num_layers, total, model.num_heads, model.head_dim)
        k_shape = (model.num_layers, total, model.num_kv_heads, model.head_dim)
        shapes = (q_shape, k_shape, q_shape, k_shape, k_shape)
        q_pre, k_pre, q, k, v = (torch.randn(s, generator=self.generator) for s in shapes)
        return PagedSequence(q_pre, k_pre, q, k, v, prompt, top_p)

    def step(self, takes: Sequence[Take]) -> list[Tensor]:
        """Compute the next tokens of some sequences; outputs [layers, taken, H, D] of each."""
        spans = [self._span(index, count, rule) for index, count, rule in takes]
        requests = {
            index: Request(
                index, [0] * self.prompt_tokens, SamplingParams(attention_top_p=sequence.top_p)
            )
            for index, sequence in enumerate(self.sequences)
        }
        metadata = self.tensors.build(Batch(spans), requests)
        attention = PagedAttention(self.layers, metadata)
        outputs = []
        for layer in range(self.model.num_layers):
            inputs = [
                torch.cat(
                    [
                        getattr(self.sequences[span.request_id], name)[
                            layer, span.start : span.stop
                        ]
                        for span in spans
                    ]
                )
                for name in ("q_pre", "k_pre", "q", "k", "v")
            ]
            outputs.append(attention.attend(layer, *inputs))
        self.newest = attention
        for span in spans:
            self.sequences[span.request_id].computed = span.stop
            self._slide(self.sequences[span.request_id])
        return list(torch.split(torch.stack(outputs), [count for _, count, _ in takes], dim=1))

    def _span(self, index: int, count: int, rule: Rule) -> Span:
        sequence = self.sequences[index]
        stop = sequence.computed + count
        while len(sequence.full_blocks) * self.block < stop:
            sequence.full_blocks.append(self.free_full.pop())
            sequence.window_blocks.append(self.free_window.pop())
        return Span(
            index,
            index,
            sequence.computed,
            [0] * count,
            rule,
            sequence.full_blocks if self.has_full else [],
            sequence.window_blocks if self.has_window else [],
            True,
            sequence.epoch,
        )

    def _slide(self, sequence: PagedSequence) -> None:
        """Free window pages that no later query sees, and poison them."""
        if not self.has_window:
            return
        assert self.model.sparse is not None
        lowest = sequence.computed - self.model.sparse.window_tokens + 1
        for block, page in enumerate(sequence.window_blocks):
            is_sink = block * self.block < self.model.sparse.sink_tokens
            if page and not is_sink and (block + 1) * self.block <= lowest:
                for layer in self.cache.layers:
                    layer.window_k[page] = torch.nan
                    layer.window_v[page] = torch.nan
                self.free_window.insert(0, page)
                sequence.window_blocks[block] = 0

    def restart(self, index: int) -> None:
        """Preempt a sequence: all pages go back, and hold NaN until they are written again."""
        sequence = self.sequences[index]
        for page in filter(None, sequence.window_blocks):
            self.free_window.insert(0, page)
        for layer in self.cache.layers if self.has_full else ():
            for tensor in layer.full_tensors:
                tensor[sequence.full_blocks] = poison_of(tensor)
        self.free_full[:0] = sequence.full_blocks
        sequence.full_blocks, sequence.window_blocks = [], []
        sequence.computed = 0
        sequence.epoch += 1

    def attended(self) -> dict[int, Tensor]:
        """Tokens attended in the newest step, by layer."""
        assert self.newest is not None
        return self.newest.attended

    def expected(self, index: int) -> Tensor:
        """Every output of a sequence from masks: [layers, n, H, D]."""
        naive = NaiveAttention(self.model, self.indexers, self.index_dtype)
        return naive.outputs(self.sequences[index])


def poison_of(tensor: Tensor) -> float:
    """What shows in every result that it gets into; 8 bits hold no NaN, but their scales do."""
    return torch.nan if tensor.is_floating_point() else 127


# Prompt and total tokens of the sequences of a driver; each decodes across the edge of a block.
RAGGED = ((1, 10), (41, 50), (64, 70))


def ragged_outputs(driver: Driver) -> list[Tensor]:
    """What each sequence of `RAGGED` gets, prefill chunks and decode rows mixed in every step."""
    steps: list[list[Take]] = [
        [(0, 1, "prefill"), (1, 17, "prefill")],
        [(0, 1, "decode"), (1, 23, "prefill"), (2, 33, "prefill")],
        [(0, 1, "decode"), (1, 1, "prefill"), (2, 30, "prefill")],
        [(1, 1, "decode"), (0, 7, "decode"), (2, 1, "prefill")],
        [(1, 8, "decode"), (2, 6, "decode")],
    ]
    outputs: list[list[Tensor]] = [[] for _ in RAGGED]
    for takes in steps:
        for (index, _, _), out in zip(takes, driver.step(takes), strict=True):
            outputs[index].append(out)
    return [torch.cat(parts, dim=1) for parts in outputs]
