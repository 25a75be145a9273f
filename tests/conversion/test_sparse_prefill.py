"""Sparse prefill through the serving path, on the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conversion.sequence import CachedSequence
from engine.embedded import embedded_model_path
from engine.model.attention_layers import PrefillMode
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder
from kernels.prefill_sparse import DENSE_TAIL

PROMPT = 1500


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(embedded_model_path(), "cpu", torch.float32)


def hidden_states(
    decoder: Decoder, top_p: float, mode: PrefillMode, *, dense_below: int = 0
) -> torch.Tensor:
    """Of a prompt's tokens [T, E]."""
    sparse = decoder.config.sparse
    assert sparse is not None
    shares = tuple(tuple(top_p for _ in layer) for layer in sparse.top_p)
    config: ModelConfig = replace(
        decoder.config, sparse=replace(sparse, top_p=shares, dense_below=dense_below)
    )
    sequence = CachedSequence(
        decoder, config, decoder.indexers, PROMPT, chunk_tokens=PROMPT, prefill_attention=mode
    )
    ids = torch.randint(100, 4000, (PROMPT,), generator=torch.Generator().manual_seed(0))
    return sequence.prefill(ids.tolist())


def assert_same(found_TE: torch.Tensor, wanted_TE: torch.Tensor) -> None:
    """But for the order of sums: each token's state to 2^-16 of its length."""
    off_T = (found_TE - wanted_TE).norm(dim=-1) / wanted_TE.norm(dim=-1)
    assert float(off_T.max()) < 2**-16


def test_with_the_whole_mass_it_is_dense(decoder: Decoder) -> None:
    assert_same(hidden_states(decoder, 1.0, "sparse"), hidden_states(decoder, 1.0, "dense"))


def test_it_changes_the_middle_of_a_prompt_and_nothing_below_the_threshold(
    decoder: Decoder,
) -> None:
    dense = hidden_states(decoder, 0.1, "dense")
    sparse = hidden_states(decoder, 0.1, "sparse")
    assert_same(sparse[:128], dense[:128])  # own blocks and the one before
    middle = slice(512, PROMPT - DENSE_TAIL)
    assert not torch.allclose(sparse[middle], dense[middle], atol=1e-3)
    below = hidden_states(decoder, 0.1, "sparse", dense_below=PROMPT + 1)
    assert_same(below, dense)
