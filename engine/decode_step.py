"""Steps of single decode tokens: shapes are fixed and nothing is decided on the host, so that they
can be recorded as CUDA graphs.

Every padded batch size has its own recording of the same launches over the same buffers:

    inputs come in -> [tables, embedding, layers, logits, tokens and token budget] -> one copy

Shapes: R rows with padding, E hidden size, V logits width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch
from engine.decode_buffers import DecodeBuffers
from engine.model.attention import PagedAttention
from engine.model.attention_layers import AttentionLayers
from engine.model.decoder import Decoder
from engine.request import Request


@dataclass(frozen=True, slots=True)
class DecodeOutputs:
    """What a step leaves on the device; the next step writes over it."""

    logits_RV: Tensor  # in the model's dtype
    numbers: Tensor  # float64, all that the host wants of a plain step: see `step_ops.pick_tokens`
    sizes: Sequence[int]  # of its parts: tokens, finite, then the budget's if a layer selects
    widths: Mapping[int, int]  # heads of each layer that selects


Step = Callable[[], DecodeOutputs]


class GraphBackend(Protocol):
    """Turns a step into one that can be repeated over the same memory."""

    def capture(self, step: Step) -> Step: ...


class Eager:
    """Repeats a step by running it: for devices without graphs, and to compare with them."""

    def capture(self, step: Step) -> Step:
        return step


class CudaGraphs:
    """Records a step once and replays it; all recordings share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def capture(self, step: Step) -> Step:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()  # what libraries make on first use is not made while recording
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = self._graphs[0].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                outputs = step()
        self._graphs.append(graph)

        def replay() -> DecodeOutputs:
            graph.replay()
            return outputs

        return replay


class DecodeStep:
    """Runs batches in which every span is one token under the decode rule."""

    def __init__(
        self,
        decoder: Decoder,
        layers: AttentionLayers,
        buffers: DecodeBuffers,
        backend: GraphBackend,
        max_rows: int,
    ) -> None:
        """Captures every size, the largest first, so that the smaller ones reuse its memory.

        Args:
            layers: with kernels, which take rows without a context.
        """
        assert layers.kernels is not None, "the PyTorch ops do not take padded rows"
        self._decoder = decoder
        self._layers = layers
        self._buffers = buffers
        self.is_recorded = isinstance(backend, CudaGraphs)
        self.sizes = padded_sizes(max_rows)
        self._steps: dict[int, Step] = {}
        for size in reversed(self.sizes):
            self._steps[size] = backend.capture(lambda size=size: self._compute(size))  # type: ignore[misc]  # default binds it

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is of this kind."""
        single = all(span.rule == "decode" and len(span.tokens) == 1 for span in batch.spans)
        return bool(batch.spans) and single and len(batch.spans) <= self.sizes[-1]

    def run(self, batch: Batch, requests: Mapping[int, Request]) -> DecodeOutputs:
        """Start a step; row i is span i. Does not wait for the device.

        At most one step may be under way that was not waited for.
        """
        self._buffers.fill(batch, requests)
        size = next(size for size in self.sizes if size >= len(batch.spans))
        return self._steps[size]()

    def keep(self, tokens_R: Tensor, rows_R: Tensor) -> None:
        """Other tokens than `run` gave were chosen for these rows: int64, on the device."""
        self._buffers.keep(tokens_R, rows_R)

    def _compute(self, rows: int) -> DecodeOutputs:
        metadata = self._buffers.metadata(rows)
        attention = PagedAttention(self._layers, metadata)
        hidden_RE = self._decoder(metadata.token_ids_T, metadata.positions_T, attention)
        logits_RV = self._decoder.raw_logits(hidden_RE)
        widths = {layer: counts.shape[1] for layer, counts in attention.attended.items()}
        counts_RH, sizes = None, [rows, rows]
        if widths:
            counts_RH = torch.cat(tuple(attention.attended.values()), dim=1)
            sizes += [rows] * 3 + [counts_RH.shape[1]] * 2
        numbers = self._buffers.pick_tokens(logits_RV, hidden_RE, counts_RH)
        return DecodeOutputs(logits_RV, numbers, sizes, widths)


def padded_sizes(max_rows: int) -> list[int]:
    """Powers of two below `max_rows`, and that number itself."""
    sizes = [1]
    while sizes[-1] * 2 < max_rows:
        sizes.append(sizes[-1] * 2)
    return sizes if max_rows == 1 else [*sizes, max_rows]
