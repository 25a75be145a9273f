"""A small model on a device, and documents for it: the same on every device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument, planted_document
from conversion.parallel import Ranks
from conversion.text_source import TextSource, load_tokenizer
from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.decoder import Decoder, Indexer
from engine.model.weights import load_decoder

HEADS = ((), (1, 2, 4), (0, 5))
TOKENS, INDEX_DIM = 480, 4
SPARSE = SparseAttentionConfig(
    retrieval_heads=HEADS,
    window_tokens=64,
    index_dim=INDEX_DIM,
    block_tokens=16,
    top_p=tuple(tuple(0.8 for _ in heads) for heads in HEADS),
)


@dataclass(frozen=True)
class Host:
    """The model on one device in float32, and documents for it."""

    decoder: Decoder
    config: ModelConfig
    ranks: Ranks
    texts: list[list[int]]
    planted: list[PlantedDocument]

    @classmethod
    def make(cls, folder: Path, text: Path, device: str) -> Host:
        decoder = load_decoder(folder, device, torch.float32)
        tokenizer = load_tokenizer(folder)
        texts = TextSource.find(text).documents(tokenizer, 4, TOKENS, 0)
        planted = [planted_document(ids, tokenizer, seed) for seed, ids in enumerate(texts)]
        config = replace(decoder.config, sparse=SPARSE)
        return cls(decoder, config, Ranks(device=torch.device(device)), texts, planted)

    def random_indexers(self) -> list[Indexer | None]:
        """The same on every device."""
        generator = torch.Generator().manual_seed(0)
        device = self.ranks.device

        def random(heads: int) -> Tensor:
            shape = (heads, INDEX_DIM, self.config.head_dim)
            return torch.randn(shape, generator=generator).to(device)

        return [Indexer(random(len(h)), random(len(h))) if h else None for h in HEADS]
