"""A tiny model with head roles, and a training of its index."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument, planted_document
from conversion.fit_options import FitOptions
from conversion.index_weights import GroupWeights, IndexWeights, index_groups
from conversion.indexer_training import IndexerTraining
from conversion.parallel import Ranks
from engine.model.config import IndexScope, ModelConfig, SparseAttentionConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder
from kernels.block_age import AGE_RANGES
from tests.engine.byte_tokenizer import byte_tokenizer
from tests.engine.model.tiny_models import make_checkpoint

HEADS = ((), (1, 2, 4), (0, 5))
TOKENS, INDEX_DIM, BLOCK = 200, 4, 16
OPTIONS = FitOptions(steps=6, queries=24, learning_rate=1e-2, warmup_steps=2, save_every=2)


@dataclass
class Tiny:
    """A random model with head roles and random projections."""

    decoder: Decoder
    config: ModelConfig
    start: IndexWeights

    @classmethod
    def make(cls, folder: Path, scope: IndexScope = "query_head", *, ages: bool = False) -> Tiny:
        make_checkpoint("qwen3", folder)
        decoder = load_decoder(folder, "cpu", torch.float32)
        sparse = SparseAttentionConfig(
            retrieval_heads=HEADS,
            window_tokens=32,
            index_dim=INDEX_DIM,
            index_scope=scope,
            index_age_bias=ages,
            block_tokens=BLOCK,
            top_p=tuple(tuple(0.9 for _ in heads) for heads in HEADS),
        )
        config = replace(decoder.config, sparse=sparse)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return 0.3 * torch.randn(*shape, config.head_dim, generator=generator)

        groups = [
            GroupWeights(group, random(len(group.heads), INDEX_DIM), random(INDEX_DIM))
            for group in index_groups(config)
        ]
        start = IndexWeights(tuple(groups))
        if ages:
            heads = sum(map(len, HEADS))
            start = start.with_age_biases(torch.randn(heads, AGE_RANGES, generator=generator))
        return cls(decoder, config, start)

    def training(
        self, options: FitOptions = OPTIONS, ranks: Ranks | None = None
    ) -> IndexerTraining:
        return IndexerTraining(self.decoder, self.config, self.start, options, 0, ranks)


def documents(count: int) -> list[PlantedDocument]:
    ids = torch.randint(64, 320, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    return [planted_document(text, byte_tokenizer(320), 1) for text in ids.tolist()]
