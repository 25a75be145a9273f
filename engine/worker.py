"""Runs batches on the model: ints in, tokens out. Everything that owns tensors is behind here.

Legend: T tokens of the batch, E hidden size, R rows that sample, V logits width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, TypeVar

import torch

from engine.batch import Batch, Span
from engine.config import AttentionMode
from engine.decode_buffers import DecodeBuffers
from engine.decode_step import CudaGraphs, DecodeStep, Eager
from engine.device import give_back_unused, is_out_of_memory
from engine.errors import StepMemoryError
from engine.messages import EngineInfo
from engine.model.attention import PagedAttention
from engine.model.attention_layers import AttentionLayers
from engine.model.batch_tensors import BatchTensors
from engine.model.decode_kernels import DecodeKernels
from engine.model.decoder import Decoder
from engine.model.kv_cache import KVCache
from engine.model.prefill_kernels import SpanKernels
from engine.prompt_logprobs import step_prompt_logprobs
from engine.queued_step import QueuedStep, StartedStep
from engine.request import Request
from engine.sampler import PendingSamples, Sampler, is_plain_greedy
from engine.step import StepResult
from engine.token_budget import PendingBudget, queue_budget
from engine.token_draw import Draw
from engine.transfer import Readback, upload

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ModelRunner:
    """Implements `engine.step.Runner` with a decoder over a paged cache."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        info: EngineInfo,
        device: torch.device,
        prefill_attention: AttentionMode = "dense",
        kernels: DecodeKernels | None = None,
        prefill_kernels: SpanKernels | None = None,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        """
        Args:
            decoder: on `device`, with its kernels if any; a `config.sparse` of None serves it
                densely.
            cache: pages for `info.full_pages` and `info.window_pages`.
            info: facts that the front end is told.
            device: where all tensors of a step are made.
            prefill_attention: what retrieval heads with an indexer read for prompt tokens.
            kernels: for decode rows; None: the PyTorch ops.
            prefill_kernels: for prompt tokens; None: the PyTorch ops.
            cuda_graphs: record steps of decode tokens and replay them, on a GPU with kernels.
        """
        self.info = info
        self._decoder = decoder
        self._cache = cache
        self._device = device
        self._layers = AttentionLayers(
            decoder.config,
            cache,
            decoder.indexers,
            device,
            prefill_attention=prefill_attention,
            kernels=kernels,
            prefill_kernels=prefill_kernels,
            layer_kernels=decoder.kernels,
        )
        self._sampler = Sampler(info.eos_token_ids)
        self._tensors = BatchTensors(
            max_num_seqs=info.max_num_seqs,
            max_blocks=-(-info.max_model_len // info.block_tokens),
            block_tokens=info.block_tokens,
            device=device,
        )
        self._decode = None if kernels is None else self._decode_step(cuda_graphs)

    @property
    def overlaps(self) -> bool:
        """Where decode steps are recorded. Elsewhere `start` takes as long as a step or longer: a
        token would only be told later."""
        return self._decode is not None and self._decode.is_recorded

    @property
    def decodes_with(self) -> Literal["PyTorch ops", "CUDA kernels", "CUDA graphs"]:
        """What a step of decode tokens is made of."""
        if self._decode is None:
            return "PyTorch ops"
        return "CUDA graphs" if self._decode.is_recorded else "CUDA kernels"

    @property
    def prefills_with(self) -> str:
        """What computes attention of prompt tokens."""
        kernels = self._layers.prefill_kernels
        return "PyTorch ops" if kernels is None else f"{kernels.name} kernels"

    @torch.inference_mode()
    def _decode_step(self, cuda_graphs: bool) -> DecodeStep:
        recorded = cuda_graphs and self._device.type == "cuda"
        rows, moe, kernels = self.info.max_num_seqs, self._decoder.config.moe, self._decoder.kernels
        if moe is not None and (kernels is None or not kernels.takes_experts(rows, moe)):
            logger.info("decode steps are not recorded as CUDA graphs: the host sorts experts")
            recorded = False
        tables = (self._tensors.full, self._tensors.window)
        return DecodeStep(
            self._decoder,
            self._layers,
            DecodeBuffers(
                rows, *tables, self.info.block_tokens, None if kernels is None else kernels.library
            ),
            CudaGraphs(self._device) if recorded else Eager(),
            rows,
        )

    @torch.inference_mode()
    def start(self, batch: Batch, requests: Mapping[int, Request]) -> StartedStep:
        """Queue one step on the device; its `finish` names in `failed` what was not finite.

        Raises:
            StepMemoryError: there was no memory. KV is written again to the same places, samples
                depend on nothing that was kept, and block tables are sent anew: a retry is safe.
        """
        step = self._attempt(batch, lambda: self._start(batch, requests))
        return StartedStep(step, self._finish)

    def _start(self, batch: Batch, requests: Mapping[int, Request]) -> QueuedStep:
        readback = Readback()
        if self._decode is not None and self._decode.takes(batch):
            step = self._start_decode(self._decode, batch, requests, readback)
        else:
            step = self._start_mixed(batch, requests, readback)
        readback.send()
        return step

    @torch.inference_mode()
    def _finish(self, step: QueuedStep) -> StepResult:
        return self._attempt(step.batch, lambda: self._read(step))

    def _read(self, step: QueuedStep) -> StepResult:
        result = step.read()
        self._scrub(span for span in step.batch.spans if span.request_id in result.failed)
        entries = step_prompt_logprobs(
            step, result.failed, self._decoder.logits, self.info.vocab_size
        )
        return replace(result, prompt_logprobs=entries)

    def _attempt(self, batch: Batch, work: Callable[[], Result]) -> Result:
        """Do a part of a step. Raises StepMemoryError where that finds no memory."""
        try:
            return work()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Past the handler: until here the traceback held the tensors of the step. The KV pools are
        # allocated once, so dropping cached prefixes would free nothing.
        for span in batch.spans:
            self._tensors.forget(span.request_id)
        give_back_unused(self._device)
        raise StepMemoryError(reason)

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended; unknown ids are ignored."""
        self._sampler.forget(request_id)
        self._tensors.forget(request_id)

    def _start_decode(
        self,
        decode: DecodeStep,
        batch: Batch,
        requests: Mapping[int, Request],
        readback: Readback,
    ) -> QueuedStep:
        """One token of every span; a row's tokens are in the outputs unless a request asks more."""
        outputs = decode.run(batch, requests)
        rows = [row for row, span in enumerate(batch.spans) if span.sample]
        draws = [_draw(batch.spans[row], requests) for row in rows]
        tokens, finite, *budget_parts = readback.add_joined(outputs.numbers, outputs.sizes)
        if not all(map(is_plain_greedy, draws)):
            at_R = upload(rows, torch.int64, self._device)
            samples = self._sampler.queue(outputs.logits_RV[at_R].float(), draws, readback)
            assert samples.chosen_R is not None
            decode.keep(samples.chosen_R, at_R)
        else:
            samples = PendingSamples([draw.request for draw in draws], tokens, finite, rows=rows)
        budget = None
        if budget_parts:
            ids = [(row, batch.spans[row].request_id) for row in rows]
            budget = PendingBudget(ids, outputs.widths, budget_parts)
        return QueuedStep(batch, readback, finite, samples, budget)

    def _start_mixed(
        self, batch: Batch, requests: Mapping[int, Request], readback: Readback
    ) -> QueuedStep:
        """Any spans whose tokens are known; logits only of the rows that sample."""
        metadata = self._tensors.build(batch, requests)
        attention = PagedAttention(self._layers, metadata)
        hidden_TE = self._decoder(metadata.token_ids_T, metadata.positions_T, attention)
        ends = upload([stop - 1 for _, stop in batch.rows()], torch.int64, self._device)
        unfit_T = ~hidden_TE.float().sum(dim=-1).isfinite()
        unfit_S = unfit_T.cumsum(0)[ends]  # up to the end of each span
        finite = readback.add(unfit_S.diff(prepend=unfit_S.new_zeros(1)) == 0)
        rows, draws = [], []
        for span, (_, stop) in zip(batch.spans, batch.rows(), strict=True):
            if span.sample:
                rows.append(stop - 1)
                draws.append(_draw(span, requests))
        samples = None
        if rows:
            logits_RV = self._decoder.logits(hidden_TE[upload(rows, torch.int64, self._device)])
            samples = self._sampler.queue(logits_RV, draws, readback)
        budget = queue_budget(batch, attention.attended, readback)
        owners = [requests[span.request_id] for span in batch.spans]
        return QueuedStep(batch, readback, finite, samples, budget, owners, hidden_TE)

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
            self._cache.wipe(full, window)


def _draw(span: Span, requests: Mapping[int, Request]) -> Draw:
    request = requests[span.request_id]
    return Draw(request, span.stop - request.prompt_len)
