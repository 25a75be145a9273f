"""The model in training: float32 weights, the dtype it computes in, one process or several.

AdamW at a learning rate of 3e-6 moves weights by less than bfloat16 can hold, so steps are taken on
float32 weights and the model computes with their rounded copy: what is measured while training is
what will be exported.

Memory per parameter and process: 16 bytes (weight, gradient, two moments) over the number of
processes, and the copy in bfloat16 of the whole model in one process, of a layer or two in several.

Shapes: Z sequences, L tokens of each, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint as recomputed

from conversion.parallel import Ranks, fill, gathered, shard
from conversion.student_attention import StudentAttention
from engine.model.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.model.weight_names import weight_rules
from engine.model.weights import TensorReader, joined_parts, stored_parts


class LogitsModel(nn.Module):
    """A decoder that answers with logits, so that every weight is used inside one forward pass."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids_ZL: Tensor, rows: int, attention: StudentAttention) -> Tensor:
        """Next-token logits after the last `rows` tokens of each sequence, float32 [Z, rows, V]."""
        sequences, length = ids_ZL.shape
        positions_T = torch.arange(length, device=ids_ZL.device).repeat(sequences)
        hidden_TE: Tensor = self.decoder(ids_ZL.flatten(), positions_T, attention)
        hidden_ZLE = hidden_TE.view(sequences, length, -1)
        return self.decoder.logits(hidden_ZLE[:, length - rows :])


class Student:
    """A model and the float32 weights behind it, `parameters`, by their names in `Decoder`.

    In one process that computes in float32, or in several (FSDP2 rounds as it gathers), the model's
    own parameters are those weights; else the model is a copy of lower precision.
    """

    def __init__(
        self, checkpoint: Checkpoint, ranks: Ranks, dtype: torch.dtype, *, recompute: bool
    ) -> None:
        """
        Args:
            dtype: what the model computes in.
            recompute: compute layers again in the backward pass instead of keeping what they need.

        Raises:
            CheckpointError: a weight file has become unreadable.
        """
        self.config = replace(checkpoint.config, sparse=None)
        self.device = ranks.device
        self.dtype = dtype
        self.checkpoint = checkpoint
        with torch.device("meta"):
            self._exact = LogitsModel(Decoder(self.config))
        if ranks.world > 1:
            shard(self._exact, list(self._exact.decoder.layers), self.dtype, ranks)
        self._exact.to_empty(device=ranks.device)
        # Taken once: while a sharded model computes, gathered tensors stand in their places.
        self.parameters = dict(self._exact.decoder.named_parameters())
        self._load()
        self.model = self._exact
        if ranks.world == 1 and self.dtype != torch.float32:
            self.model = deepcopy(self._exact).to(self.dtype)
        if recompute:
            for layer in self.model.decoder.layers:
                layer.forward = partial(
                    recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False
                )

    def collect_gradients(self) -> None:
        """After a backward pass: add the model's gradients to those of the float32 weights."""
        if self.model is self._exact:
            return
        pairs = zip(self.parameters.values(), self.model.parameters(), strict=True)
        for exact, rounded in pairs:
            assert rounded.grad is not None
            gradient = rounded.grad.float()
            exact.grad = gradient if exact.grad is None else exact.grad.add_(gradient)
            rounded.grad = None

    @torch.no_grad()
    def round_weights(self) -> None:
        """After the float32 weights have changed: bring the model up to date."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # or what was gathered before would be computed with again
        elif self.model is not self._exact:
            torch._foreach_copy_(list(self.model.parameters()), list(self.parameters.values()))

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by checkpoint name; all processes must run through it together."""
        for rule in weight_rules(self.config):
            yield from stored_parts(rule, gathered(self.parameters[rule.target]))

    @torch.no_grad()
    def _load(self) -> None:
        """Fill the weights parameter by parameter; no process holds more than its part and one."""
        parameters = dict(self.parameters)
        with TensorReader(self.checkpoint.tensors) as reader:
            for rule in weight_rules(self.config):
                parameter = parameters.pop(rule.target)
                fill(parameter, joined_parts(rule, reader).view(parameter.shape))
        assert not parameters
