"""What stage 2 will need per device, before anything is allocated. Estimates, torch-free.

With `recompute`, which is how a model of 30 billion parameters fits, activations are the input of
every layer plus what one layer needs while its gradients are computed; neither grows with the
square of the length. The weights of such a model are 16 bytes each over all devices: eight devices
of 80 GB hold 30 billion (60 GB on each) with sequences of 16K.
"""

from __future__ import annotations

from dataclasses import dataclass

from conversion.distil_options import DistilOptions
from engine.model.byte_size import shown_bytes
from engine.model.checkpoint import Checkpoint
from engine.model.config import ModelConfig, SparseAttentionConfig

TRAINED_BYTES = 16  # float32 weight, gradient and two moments


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes per device."""

    training: int  # weights, gradients, moments
    compute: int  # the weights that layers compute with
    activations: int

    @property
    def total(self) -> int:
        return self.training + self.compute + self.activations

    def __str__(self) -> str:
        parts = (self.total, self.training, self.compute, self.activations)
        total, training, compute, activations = map(shown_bytes, parts)
        return (
            f"about {total} per device: {training} for weights, gradients and moments, "
            f"{compute} to compute with, {activations} for activations"
        )


def estimate_memory(
    checkpoint: Checkpoint, sparse: SparseAttentionConfig, options: DistilOptions, world: int
) -> MemoryEstimate:
    """Of training on `world` processes, each with a device of its own."""
    config = checkpoint.config
    item = 4 if options.device == "cpu" else 2
    counts = {name: stored.count for name, stored in checkpoint.tensors.items()}
    count = sum(counts.values())
    in_layers = sum(own for name, own in counts.items() if name.startswith("model.layers."))
    if world > 1:  # what lies outside the layers, and two layers at a time
        compute = item * (count - in_layers + 2 * in_layers // config.num_layers)
    else:
        compute = 0 if item == 4 else item * count
    tokens = max(options.micro_tokens, options.sequence_tokens)
    tokens = min(tokens, -(-options.batch // world) * options.sequence_tokens)
    tokens -= tokens % options.sequence_tokens
    return MemoryEstimate(
        training=TRAINED_BYTES * count // world,
        compute=compute,
        activations=_activations(config, sparse, options, tokens, item),
    )


def _activations(
    config: ModelConfig,
    sparse: SparseAttentionConfig,
    options: DistilOptions,
    tokens: int,
    item: int,
) -> int:
    """What a backward pass finds, at its fullest."""
    layers, hidden = config.num_layers, config.hidden_size
    one = tokens * _layer_bytes_per_token(config, item)
    rows = options.response_tokens * tokens // options.sequence_tokens
    selecting = max(map(len, sparse.retrieval_heads), default=0)
    selection = rows * selecting * options.sequence_tokens * (4 + 4 + item)
    fold = max(sparse.window_tokens, sparse.sink_tokens)
    masks = 3 * 2 * fold * fold * (1 + item) if fold < options.sequence_tokens else 0
    logits = 3 * 4 * rows * config.vocab_size
    kept = layers * tokens * hidden * item + one if options.recompute else layers * one
    return kept + max(selection, logits) + masks


def _layer_bytes_per_token(config: ModelConfig, item: int) -> int:
    """What one layer keeps of a token for its backward pass, gradients of the widest part included.

    Norms keep float32; queries, keys and values exist plain, normed, turned, and keys and values
    once more per query head in two neighbouring folds.
    """
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    norms = 2 * config.hidden_size * (4 + 2 * item)
    attention = item * dim * (4 * (heads + 2 * kv_heads) + 4 * heads + 8 * heads)
    width, copies = config.intermediate_size, 1
    if config.moe is not None:
        width, copies = config.moe.intermediate_size, config.moe.experts_per_token
    mlp = item * copies * (5 * width + 2 * config.hidden_size)
    return norms + attention + mlp
