"""One decoder for every supported family; what differs between them is in ModelConfig.

Shapes: T tokens of any number of sequences, concatenated; E hidden size; R rows; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.layer_kernels import LayerKernels
from engine.model.layers import Attention, AttentionBlock, Mlp, RMSNorm
from engine.model.moe import MoeMlp
from engine.model.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class Indexer:
    """Projections of one layer's retrieval heads to the index space, and their bias by age.

    q_proj_HID: [retrieval heads, index_dim, head_dim]
    k_proj_HID: [retrieval heads or full KV heads (index_scope), index_dim, head_dim]
    age_bias_HA: float32 [retrieval heads, AGE_RANGES], as `kernels.block_age`; None: no bias
    """

    q_proj_HID: Tensor
    k_proj_HID: Tensor
    age_bias_HA: Tensor | None = None


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual.

    With kernels a sum waits for the norm after it, which does both.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.attention = AttentionBlock(config, layer)
        self.post_attention_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.moe is None or layer in config.moe.dense_layers:
            self.mlp = Mlp(hidden, config.intermediate_size, config.mlp_bias)
        else:
            self.mlp = MoeMlp(hidden, config.moe)

    def forward(self, x_TE: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x_TE = x_TE + self.attention(self.input_norm(x_TE), cos, sin, attention)
        out: Tensor = x_TE + self.mlp(self.post_attention_norm(x_TE))
        return out

    def run_fused(
        self,
        x_TE: Tensor,
        branch_TE: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        kernels: LayerKernels,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and a branch that is still to be added to it, in and out."""
        x_TE, normed_TE = kernels.add_norm(x_TE, branch_TE, self.input_norm)
        branch_TE = self.attention(normed_TE, cos, sin, attention)
        x_TE, normed_TE = kernels.add_norm(x_TE, branch_TE, self.post_attention_norm)
        return x_TE, self.mlp(normed_TE, kernels)


class Decoder(nn.Module):
    """Embedding, layers, final norm and language-model head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn: whoever makes a decoder fills it. On the meta device, drawing normal numbers
        # alone would import torch's compiler, which is half of what a start of the engine takes.
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.indexers: list[Indexer | None] = [None] * config.num_layers
        self.kernels: LayerKernels | None = None
        """Set for inference on a GPU; then attention must be one that stores with them."""
        self._rope: RotaryEmbedding | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of all weights, indexers included."""
        indexers = (indexer for indexer in self.indexers if indexer is not None)
        tensors: list[Tensor] = [*self.parameters()]
        for indexer in indexers:
            tensors += [indexer.q_proj_HID, indexer.k_proj_HID]
            tensors += [] if indexer.age_bias_HA is None else [indexer.age_bias_HA]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Hidden states [T, E] after the final norm.

        Args:
            token_ids_T: int64 token ids.
            positions_T: int64 positions inside their sequences.
            attention: computes every layer's attention and owns what it needs to know of the past.
        """
        x_TE: Tensor = self.embedding(token_ids_T)
        rotary, kernels = self._rotary(x_TE.device), self.kernels
        if kernels is not None:
            cos, sin = rotary.tables(positions_T, torch.float32)  # what the kernel computes in
            branch_TE = None
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                x_TE, branch_TE = layer.run_fused(x_TE, branch_TE, cos, sin, attention, kernels)
            return kernels.add_norm(x_TE, branch_TE, self.final_norm)[1]
        cos, sin = rotary.tables(positions_T, x_TE.dtype)
        for layer in self.layers:
            x_TE = layer(x_TE, cos, sin, attention)
        out: Tensor = self.final_norm(x_TE)
        return out

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Next-token logits, float32 [R, V]."""
        return self.raw_logits(hidden_RE).float()

    def raw_logits(self, hidden_RE: Tensor) -> Tensor:
        """Next-token logits as they are computed, in the model's dtype."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden_RE, weight)

    def _rotary(self, device: torch.device) -> RotaryEmbedding:
        """Made on first use: frequencies are no weights, and know neither meta device nor dtype."""
        if self._rope is None or self._rope.device != device:
            self._rope = RotaryEmbedding(self.config.rope, self.config.head_dim, device)
        return self._rope
