"""Needle scores against the full attention matrix, and the documents that they are taken on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversion.calibration import needle_document, needle_lengths, needle_scores
from conversion.errors import ConversionError
from engine.model.dense_attention import DenseAttention
from engine.model.weights import load_decoder
from tests.engine.byte_tokenizer import byte_tokenizer
from tests.engine.model.tiny_models import make_checkpoint


@dataclass
class FullSoftmax:
    """Dense attention that keeps the whole matrix of every layer, [H, T, T]."""

    matrices: list[Tensor] = field(default_factory=list)

    def attend(
        self,
        layer: int,
        q_pre_THD: Tensor,
        k_pre_TND: Tensor,
        q_THD: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
    ) -> Tensor:
        group = q_THD.shape[1] // k_TND.shape[1]
        k_THD = k_TND.repeat_interleave(group, dim=1).double()
        scores_HTT = torch.einsum("thd,shd->hts", q_THD.double(), k_THD) * q_THD.shape[2] ** -0.5
        mask_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool).tril()
        self.matrices.append(scores_HTT.masked_fill(~mask_TT, float("-inf")).softmax(-1))
        return DenseAttention().attend(layer, q_pre_THD, k_pre_TND, q_THD, k_TND, v_TND)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_scores_equal_the_full_attention_matrix(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    decoder = load_decoder(tmp_path, "cpu", torch.float32)
    tokenizer = byte_tokenizer(320)
    text = torch.randint(0, 320, (2, 150), generator=torch.Generator().manual_seed(1)).tolist()
    documents = [needle_document(ids, tokenizer, 8, seed) for seed, ids in enumerate(text)]

    scores = needle_scores(decoder, documents)

    for document, found in zip(documents, scores, strict=True):
        full = FullSoftmax()
        with torch.no_grad():
            decoder(torch.tensor(document.ids), torch.arange(150), full)
        early = slice(document.early, document.early + 8)
        naive = torch.stack([m[:, -8:, early].sum(-1).mean(-1) for m in full.matrices])
        torch.testing.assert_close(torch.tensor(found).double(), naive, atol=1e-6, rtol=1e-4)
        assert naive.max() > 2 * naive.min()


def test_scores_ignore_a_sparse_section(tmp_path: Path) -> None:
    """Calibration of a converted folder measures the dense model again."""
    make_checkpoint("qwen3", tmp_path)
    decoder = load_decoder(tmp_path, "cpu", torch.float32)
    document = needle_document(list(range(70, 220)), byte_tokenizer(320), 8, 0)
    dense = needle_scores(decoder, [document])
    section = {"retrieval_heads": [[0], [], []], "window_tokens": 16, "index_dim": None}
    make_checkpoint("qwen3", tmp_path / "sparse", section=section)
    sparse = load_decoder(tmp_path / "sparse", "cpu", torch.float32)
    assert sparse.config.sparse is not None
    assert replace(sparse.config, sparse=None) == decoder.config
    assert needle_scores(sparse, [document]) == dense


def test_a_needle_stands_twice_and_holds_no_special_token() -> None:
    tokenizer = byte_tokenizer(320)
    tokenizer.add_special_tokens([f"<|{i}|>" for i in range(60)])  # ids 0 to 59 become special
    text = [100] * 300
    document = needle_document(text, tokenizer, 32, 5)
    needle = document.ids[document.early : document.early + 32]
    assert document.ids[document.late :] == needle
    assert len(document.ids) == 300
    assert min(needle) >= 60
    assert len(set(needle)) > 20
    between = document.ids[: document.early] + document.ids[document.early + 32 : document.late]
    assert set(between) == {100}
    assert needle_document(text, tokenizer, 32, 6).ids != document.ids


def test_a_document_must_hold_both_needles() -> None:
    with pytest.raises(ConversionError, match="143 tokens is too short for two needles of 32"):
        needle_document([1] * 143, byte_tokenizer(320), 32, 0)


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(8192, (2048, 4096, 8192)), (3000, (1500, 3000)), (1024, (1024,)), (300, (300,))],
    ids=str,
)
def test_lengths_are_halves_of_a_useful_length(longest: int, lengths: tuple[int, ...]) -> None:
    assert needle_lengths(longest) == lengths
