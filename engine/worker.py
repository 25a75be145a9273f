"""Runs batches on the model: ints in, tokens out. Everything that owns tensors is behind here.

Legend: T tokens of the batch, E hidden size, R rows that sample, V logits width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from engine.batch import Batch, Span
from engine.config import AttentionMode
from engine.messages import EngineInfo
from engine.model.attention import AttentionLayers, PagedAttention
from engine.model.batch_tensors import BatchTensors
from engine.model.decode_kernels import DecodeKernels
from engine.model.decoder import Decoder
from engine.model.kv_cache import KVCache
from engine.prompt_logprobs import prompt_logprobs
from engine.request import Request
from engine.sampler import Sampler
from engine.step import PromptLogprobs, Sample, StepResult
from engine.token_budget import step_budget
from kernels._launch import KernelLibrary


class ModelRunner:
    """Implements `engine.step.Runner` with a decoder over a paged cache."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        info: EngineInfo,
        device: torch.device,
        prefill_attention: AttentionMode = "dense",
        library: KernelLibrary | None = None,
    ) -> None:
        """
        Args:
            decoder: on `device`; a `config.sparse` of None serves it densely.
            cache: pages for `info.full_pages` and `info.window_pages`.
            info: facts that the front end is told.
            device: where all tensors of a step are made.
            prefill_attention: what retrieval heads with an indexer read for prompt tokens.
            library: compiled kernels for decode rows; None: the PyTorch ops.
        """
        max_blocks = -(-info.max_model_len // info.block_tokens)
        kernels = None
        if library is not None:
            kernels = DecodeKernels(
                library,
                decoder.config,
                device,
                decoder.embedding.weight.dtype,
                max_rows=info.max_num_seqs,
                max_blocks=max_blocks,
            )
        self.info = info
        self._decoder = decoder
        self._cache = cache
        self._layers = AttentionLayers(
            decoder.config,
            cache,
            decoder.indexers,
            device,
            prefill_attention=prefill_attention,
            kernels=kernels,
        )
        self._sampler = Sampler(info.eos_token_ids)
        self._tensors = BatchTensors(
            max_num_seqs=info.max_num_seqs,
            max_blocks=max_blocks,
            block_tokens=info.block_tokens,
            device=device,
        )

    @torch.inference_mode()
    def execute(self, batch: Batch, requests: Mapping[int, Request]) -> StepResult:
        """Compute one step. Requests whose values are not finite are named in `failed`."""
        metadata = self._tensors.build(batch, requests)
        attention = PagedAttention(self._layers, metadata)
        hidden_TE = self._decoder(metadata.token_ids_T, metadata.positions_T, attention)
        failed = _not_finite(batch, hidden_TE)
        samples = self._sample(batch, requests, hidden_TE, failed)
        failed |= {request_id for request_id, sample in samples.items() if sample.token is None}
        self._scrub(span for span in batch.spans if span.request_id in failed)
        attended, layer_fraction = step_budget(batch, attention.attended)
        return StepResult(
            samples=samples,
            failed=failed,
            prompt_logprobs=self._prompt_logprobs(batch, requests, hidden_TE, failed),
            attended=attended,
            layer_attended_fraction=layer_fraction,
        )

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended; unknown ids are ignored."""
        self._sampler.forget(request_id)

    def _sample(
        self,
        batch: Batch,
        requests: Mapping[int, Request],
        hidden_TE: torch.Tensor,
        failed: set[int],
    ) -> dict[int, Sample]:
        """Logits and tokens of the rows that sample, and of no others."""
        rows, owners = [], []
        for span, (_, stop) in zip(batch.spans, _rows(batch), strict=True):
            if span.sample and span.request_id not in failed:
                rows.append(stop - 1)
                owners.append(requests[span.request_id])
        if not rows:
            return {}
        logits_RV = self._decoder.logits(hidden_TE[rows])
        samples = self._sampler.sample(logits_RV, owners)
        return {request.request_id: sample for request, sample in zip(owners, samples, strict=True)}

    def _prompt_logprobs(
        self,
        batch: Batch,
        requests: Mapping[int, Request],
        hidden_TE: torch.Tensor,
        failed: set[int],
    ) -> dict[int, PromptLogprobs]:
        result = {}
        for span, (start, stop) in zip(batch.spans, _rows(batch), strict=True):
            request = requests[span.request_id]
            asked = span.rule == "prefill" and request.params.prompt_logprobs is not None
            if asked and span.request_id not in failed:
                hidden = hidden_TE[start:stop]
                result[span.request_id] = prompt_logprobs(
                    span, request, hidden, self._decoder.logits, self.info.vocab_size
                )
        return result

    def _scrub(self, spans: Iterable[Span]) -> None:
        """Zero the pages that a failed span wrote to.

        Masked positions have weight 0, but 0 times NaN is NaN: the next owner of such a page, who
        fills it only in part, must not find any.
        """
        for span in spans:
            blocks = range(
                span.start // self.info.block_tokens, -(-span.stop // self.info.block_tokens)
            )
            full = [span.full_blocks[i] for i in blocks if span.full_blocks]
            window = [span.window_blocks[i] for i in blocks if span.window_blocks]
            for layer in self._cache.layers:
                for cache in (layer.full_k, layer.full_v, layer.index):
                    cache[full] = 0
                for cache in (layer.window_k, layer.window_v):
                    cache[window] = 0


def _rows(batch: Batch) -> list[tuple[int, int]]:
    """First row and end of each span among the tokens of the batch."""
    rows, start = [], 0
    for span in batch.spans:
        rows.append((start, start + len(span.tokens)))
        start += len(span.tokens)
    return rows


def _not_finite(batch: Batch, hidden_TE: torch.Tensor) -> set[int]:
    """Requests with a hidden state that is not finite; also those that do not sample yet, because
    their pages would go into the prefix cache. One reduction and one transfer for the batch."""
    finite = hidden_TE.float().sum(dim=-1).isfinite().tolist()
    return {
        span.request_id
        for span, (start, stop) in zip(batch.spans, _rows(batch), strict=True)
        if not all(finite[start:stop])
    }
