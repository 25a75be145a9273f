"""The student's attention against serving, token for token, and its gradients against autograd."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversion.sequence import CachedSequence
from conversion.student_attention import StudentAttention
from conversion.student_layers import StudentLayers
from engine.model.decoder import Decoder, Indexer
from engine.model.dense_attention import DenseAttention
from engine.model.weights import load_decoder
from kernels.reference import project_index, select_blocks
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint

VARIANTS = {
    "plain": TinyModel(),
    "one-index-per-kv-head": TinyModel(index_scope="kv_head"),
    "short-contexts-dense": TinyModel(dense_below=72),
    "ages": TinyModel(index_age_bias=True),
    "ages-and-one-index-per-kv-head": TinyModel(index_age_bias=True, index_scope="kv_head"),
    "window-of-three": TinyModel(window=3, sinks=4),
    "no-sinks": TinyModel(sinks=0),
    "more-sinks-than-window": TinyModel(window=5, sinks=8),
    "all-local": TinyModel(retrieval_heads=((), (), ())),
    "all-retrieval": TinyModel(retrieval_heads=((0, 1, 2, 3),) * 2),
}
LENGTHS = {"long": (83, 67), "off-the-block": (64, 41), "one-row": (50, 49), "inside": (20, 15)}


def sequences(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(vocab), k=length) for _ in range(count)]


def student_hidden(decoder: Decoder, ids_ZL: list[list[int]], prompt: int) -> Tensor:
    """[Z, L, E]."""
    layers = StudentLayers(
        decoder.config, decoder.indexers, torch.device("cpu"), next(decoder.parameters()).dtype
    )
    attention = StudentAttention(layers, len(ids_ZL), prompt)
    positions_T = torch.arange(len(ids_ZL[0])).repeat(len(ids_ZL))
    hidden_TE: Tensor = decoder(torch.tensor(ids_ZL).flatten(), positions_T, attention)
    return hidden_TE.view(len(ids_ZL), len(ids_ZL[0]), -1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_student_computes_what_serving_computes(
    tmp_path: Path, model: TinyModel, lengths: tuple[int, int]
) -> None:
    decoder = load_decoder(write_checkpoint(tmp_path, model), "cpu", torch.float32)
    length, prompt = lengths
    ids_ZL = sequences(3, length, model.vocab)

    found_ZLE = student_hidden(decoder, ids_ZL, prompt).detach()

    for ids, found_LE in zip(ids_ZL, found_ZLE, strict=True):
        served = CachedSequence(decoder, decoder.config, decoder.indexers, length)
        expected_LE = torch.cat([served.prefill(ids[:prompt]), served.decode(ids[prompt:])])
        torch.testing.assert_close(found_LE, expected_LE, rtol=2e-5, atol=2e-5)


def test_selection_leaves_something_out(tmp_path: Path) -> None:
    """Else the tests above would pass with dense retrieval heads."""
    decoder = load_decoder(write_checkpoint(tmp_path, TinyModel()), "cpu", torch.float32)
    ids_ZL = sequences(1, 83, 61)

    sparse = student_hidden(decoder, ids_ZL, 67)
    decoder.indexers = [None] * 3
    dense_decode = student_hidden(decoder, ids_ZL, 67)

    torch.testing.assert_close(sparse[:, :67], dense_decode[:, :67], rtol=2e-5, atol=2e-5)
    assert (sparse - dense_decode)[:, 67:].abs().amax(-1).min() > 0.1


def test_ages_change_the_selection(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TinyModel(index_age_bias=True))
    decoder = load_decoder(folder, "cpu", torch.float32)
    ids_ZL = sequences(2, 83, 61)

    aged = student_hidden(decoder, ids_ZL, 67)
    decoder.indexers = [own and replace(own, age_bias_HA=None) for own in decoder.indexers]
    plain = student_hidden(decoder, ids_ZL, 67)

    torch.testing.assert_close(aged[:, :67], plain[:, :67], rtol=2e-5, atol=2e-5)
    assert (aged - plain)[:, 67:].abs().amax(-1).median() > 0.1


def test_biases_stay_float32_in_a_model_of_lower_precision(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TinyModel(index_age_bias=True))
    decoder = load_decoder(folder, "cpu", torch.float32)
    layers = StudentLayers(decoder.config, decoder.indexers, torch.device("cpu"), torch.bfloat16)
    for own, frozen in zip(decoder.indexers, layers.indexers, strict=True):
        if own is not None:
            assert frozen is not None
            assert frozen.q_proj_HID.dtype == torch.bfloat16
            assert own.age_bias_HA is not None
            assert frozen.age_bias_HA is not None
            assert frozen.age_bias_HA.dtype == torch.float32
            assert torch.equal(frozen.age_bias_HA, own.age_bias_HA)


def test_the_teacher_is_plain_causal_attention(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TinyModel(retrieval_heads=None))
    decoder = load_decoder(folder, "cpu", torch.float32)
    ids = sequences(1, 60, 61)[0]

    found = student_hidden(decoder, [ids], 40)[0]

    expected = decoder(torch.tensor(ids), torch.arange(60), DenseAttention())
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@dataclass
class MaskedAttention:
    """One n x n matrix per head, masked by rules that are spelt out; one sequence."""

    model: TinyModel
    indexers: Sequence[Indexer | None]
    prompt: int

    def attend(self, layer: int, *qkv: Any) -> Tensor:
        q_pre_THD, k_pre_TND, q_THD, k_TND, v_TND = qkv
        heads, group = q_THD.shape[1], q_THD.shape[1] // k_TND.shape[1]
        outs = []
        for head in range(heads):
            seen = self._seen(layer, head, q_pre_THD.detach(), k_pre_TND.detach())
            scores = q_THD[:, head] @ k_TND[:, head // group].T / math.sqrt(q_THD.shape[-1])
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            outs.append(weights @ v_TND[:, head // group])
        return torch.stack(outs, dim=1)

    def _seen(self, layer: int, head: int, q_pre_THD: Tensor, k_pre_TND: Tensor) -> Tensor:
        model, tokens = self.model, len(q_pre_THD)
        m, j = torch.arange(tokens)[:, None], torch.arange(tokens)
        assert model.retrieval_heads is not None
        retrieval = model.retrieval_heads[layer]
        if head not in retrieval:
            return (j <= m) & ((m - j < model.window) | (j < model.sinks))
        seen = j <= m
        indexer, place = self.indexers[layer], retrieval.index(head)
        assert indexer is not None
        kv = torch.tensor([head * model.num_kv_heads // model.num_heads])
        qi = project_index(q_pre_THD, indexer.q_proj_HID[[place]], torch.tensor([head]))
        ki = project_index(k_pre_TND, indexer.k_proj_HID[[place]], kv)
        scores = (qi[:, 0] @ ki[:, 0].T).masked_fill(~seen, -math.inf)
        blocks = [part.logsumexp(-1) for part in torch.split(scores, model.block, dim=1)]
        mass = torch.stack(blocks, dim=-1)[:, None]
        top_p = torch.full((tokens, 1), model.top_p)
        mask = select_blocks(mass, top_p, torch.arange(1, tokens + 1), model.block)[:, 0]
        chosen = mask.repeat_interleave(model.block, dim=1)[:, :tokens]
        return seen & (chosen | (m < self.prompt))


def test_gradients_are_those_of_the_whole_matrix(tmp_path: Path) -> None:
    """Of every weight, in float64, for a loss on the response rows of two sequences."""
    model = TinyModel(window=11)
    decoder = load_decoder(write_checkpoint(tmp_path, model), "cpu", torch.float64).train()
    ids_ZL, prompt = sequences(2, 61, model.vocab), 42
    direction = torch.randn(2, 61 - prompt, model.hidden, dtype=torch.float64)

    loss = (student_hidden(decoder, ids_ZL, prompt)[:, prompt:] * direction).sum()
    torch.autograd.backward(loss)
    found = {name: weight.grad for name, weight in decoder.named_parameters()}
    decoder.zero_grad(set_to_none=True)
    masked = MaskedAttention(model, decoder.indexers, prompt)
    for ids, towards in zip(ids_ZL, direction, strict=True):
        hidden = decoder(torch.tensor(ids), torch.arange(61), masked)
        torch.autograd.backward((hidden[prompt:] * towards).sum())

    for name, weight in decoder.named_parameters():
        if name == "lm_head.weight":  # the loss is on hidden states
            continue
        assert weight.grad is not None, name
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_bfloat16_loses_no_more_than_serving_loses(tmp_path: Path) -> None:
    """Where nothing is selected, as rounding may change what the indexer takes."""
    folder = write_checkpoint(tmp_path, TinyModel(dense_below=10_000))
    exact, decoder = (load_decoder(folder, "cpu", dt) for dt in (torch.float32, torch.bfloat16))
    ids = sequences(1, 83, 61)[0]
    truth_LE = student_hidden(exact, [ids], 67)[0]
    served = CachedSequence(decoder, decoder.config, decoder.indexers, 83)
    served_LE = torch.cat([served.prefill(ids[:67]), served.decode(ids[67:])])

    found_LE = student_hidden(decoder, [ids], 67)[0]

    assert found_LE.dtype == torch.bfloat16
    assert rms(found_LE - truth_LE) < 1.5 * rms(served_LE - truth_LE)
    torch.autograd.backward(found_LE.square().mean())
    gradients = [weight.grad for name, weight in decoder.named_parameters() if "layers" in name]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)


def rms(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())


def test_bfloat16_selects_as_serving_does(tmp_path: Path) -> None:
    """Most rows agree as far as bfloat16 holds; those whose selection a rounding changed do not."""
    folder = write_checkpoint(tmp_path, TinyModel())
    exact, decoder = (load_decoder(folder, "cpu", dt) for dt in (torch.float32, torch.bfloat16))
    ids = sequences(1, 83, 61)[0]
    truth_LE = student_hidden(exact, [ids], 67)[0]
    served = CachedSequence(decoder, decoder.config, decoder.indexers, 83)
    served.prefill(ids[:67])
    served_RE = served.decode(ids[67:])
    selected_LE = student_hidden(decoder, [ids], 67)[0]
    decoder.indexers = [None] * 3
    unselected_LE = student_hidden(decoder, [ids], 67)[0]

    def usual(x_LE: Tensor) -> float:
        return float((x_LE[-16:].detach() - served_RE).float().square().mean(-1).sqrt().median())

    assert usual(selected_LE) < usual(truth_LE)  # what serving itself loses by rounding
    assert usual(unselected_LE) > 3 * usual(truth_LE)
