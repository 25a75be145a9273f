"""The decoder computes what transformers computes, for every family and option."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model.decoder import Decoder
from engine.model.dense_attention import DenseAttention
from engine.model.weights import load_decoder, stored_tensors
from tests.engine.model.tiny_models import FAMILIES, make_checkpoint

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-4  # largest absolute difference of float32 logits
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


def assert_logits_equal(folder: Path, peer: Any, vocab: int = 320) -> None:
    decoder = load_decoder(folder, "cpu", torch.float32)
    tokens_T = torch.randint(3, vocab, (200,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = peer(tokens_T[None]).logits[0]
        hidden = decoder(tokens_T, torch.arange(len(tokens_T)), DenseAttention())
        got = decoder.logits(hidden)
    assert expected.std() > 0.1  # the comparison means something
    assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    peer = make_checkpoint(family, tmp_path, tie_word_embeddings=tied)
    assert_logits_equal(tmp_path, peer)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_equals_transformers(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, **ROPES[kind]}
    peer = make_checkpoint("llama", tmp_path, rope_parameters=rope)
    assert_logits_equal(tmp_path, peer)


def test_moe_without_normalised_weights_and_with_sparse_step(tmp_path: Path) -> None:
    peer = make_checkpoint(
        "qwen3_moe", tmp_path, norm_topk_prob=False, mlp_only_layers=[], decoder_sparse_step=2
    )
    assert_logits_equal(tmp_path, peer)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_table_is_reversible(family: str, tmp_path: Path) -> None:
    peer = make_checkpoint(family, tmp_path)
    stored = dict(stored_tensors(load_decoder(tmp_path, "cpu", torch.float32)))
    again = Decoder(load_decoder(tmp_path, "cpu", torch.float32).config)
    assert sum(p.numel() for p in again.parameters()) == sum(t.numel() for t in stored.values())
    for name, tensor in peer.state_dict().items():
        if name in stored:
            assert torch.equal(stored[name], tensor)
    assert "model.layers.2.self_attn.v_proj.weight" in stored


def test_gradients_flow_to_every_parameter(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path)
    decoder = load_decoder(tmp_path, "cpu", torch.float32)
    tokens_T = torch.arange(20)
    loss = decoder.logits(decoder(tokens_T, tokens_T, DenseAttention())).square().mean()
    torch.autograd.backward([loss])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_making_a_decoder_does_not_load_the_compiler() -> None:
    """Drawing the embedding on the meta device imported it: four seconds more in every restart."""
    code = (
        "import sys, torch\n"
        "from engine.model.decoder import Decoder\n"
        "from tests.engine.head_map_model import make_model\n"
        "with torch.device('meta'):\n"
        "    Decoder(make_model([[0]]))\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
