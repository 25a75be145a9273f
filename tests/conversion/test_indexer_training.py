"""Gradient steps on the indexer against whole attention matrices, stopped and resumed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from conversion.attention_samples import PlantedDocument, sample_rows
from conversion.chunk_sizes import SIZES
from conversion.document_attention import LayerView, watch_document
from conversion.errors import ConversionError
from conversion.index_weights import IndexWeights
from conversion.parallel import Ranks
from engine.model.config import IndexScope
from kernels.block_age import age_bias
from tests.conversion.tiny_training import BLOCK, HEADS, OPTIONS, TOKENS, Tiny, documents


@dataclass
class Views:
    """What the layers showed while a document was read."""

    seen: dict[int, LayerView] = field(default_factory=dict)

    def __call__(self, view: LayerView) -> None:
        self.seen[view.layer] = view


def whole_loss(
    tiny: Tiny, weights: IndexWeights, document: PlantedDocument, rows: Tensor
) -> Tensor:
    """The sum over heads of the weighted mean KL, from n x n matrices in float64."""
    views = Views()
    watch_document(tiny.decoder, tiny.config, document.ids, views)
    total = torch.zeros((), dtype=torch.float64)
    mask_TT = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for group in weights.groups:
        view, kv = views.seen[group.group.layer], group.group.kv_head
        k_TD, key_TI = (x[:, kv].double() for x in (view.k_TND, view.k_pre_TND))
        key_TI = key_TI @ group.w_k_ID.double().T
        for row, head in enumerate(group.group.heads):
            w_q_ID = group.w_q_GID[row]
            q_TD = view.q_THD[:, head].double()
            true_TT = (q_TD @ k_TD.T * q_TD.shape[1] ** -0.5).masked_fill(~mask_TT, -1e9)
            query_TI = view.q_pre_THD[:, head].double() @ w_q_ID.double().T
            index_TT = query_TI @ key_TI.T
            if group.age_bias_GA is not None:
                index_TT = index_TT + served_biases(group.age_bias_GA[row]).double()
            index_TT = index_TT.masked_fill(~mask_TT, -1e9)
            logs = index_TT.log_softmax(-1)[rows], true_TT.log_softmax(-1)[rows]
            kl_R = kl_div(*logs, reduction="none", log_target=True).sum(-1)
            total = total + (kl_R * far_weights(logs[1].exp(), rows)).sum()
    return total


def far_weights(attention_RT: Tensor, rows: Tensor) -> Tensor:
    """Half for all rows alike; half by what a row sees past sinks, its block and the one before."""
    far = torch.zeros(len(rows), dtype=torch.float64)
    for number, row in enumerate(rows.tolist()):
        first_kept = max(row // BLOCK - 1, 1) * BLOCK
        far[number] = attention_RT[number, BLOCK:first_kept].sum()
    assert far.max() > 0.3
    share = OPTIONS.far_share * far / (far.sum() + 1)
    return share + (1 - share.sum()) / len(rows)


def served_biases(bias_A: Tensor) -> Tensor:
    """What serving adds to the block of each key, at every query: [T, T]."""
    lengths_T = torch.arange(1, TOKENS + 1)
    bias_TB = age_bias(bias_A[None], lengths_T, -(-TOKENS // BLOCK), BLOCK)[:, 0]
    return bias_TB.repeat_interleave(BLOCK, dim=1)[:, :TOKENS]


@pytest.mark.parametrize("ages", [False, True], ids=["plain", "ages"])
@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
@pytest.mark.parametrize("chunk", [1, 7 * TOKENS, 2**22], ids=["row by row", "7 rows", "at once"])
def test_gradients_equal_those_of_whole_matrices(
    scope: IndexScope, chunk: int, ages: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], scores=chunk))
    tiny = Tiny.make(tmp_path, scope, ages=ages)
    (document,) = documents(1)
    rows_R = sample_rows(document, 24, 0)
    training = tiny.training()
    loss = training.add_gradient(document, rows_R)

    weights = tiny.start.copied(torch.device("cpu"), trained=True)
    expected = whole_loss(tiny, weights, document, rows_R)
    torch.autograd.backward(expected)

    heads = sum(map(len, HEADS))
    assert loss == pytest.approx(float(expected.detach()) / heads, rel=1e-5)
    assert len(weights.groups) == (heads if scope == "query_head" else 4)
    assert len(weights.age_biases()) == (len(weights.groups) if ages else 0)
    pairs = zip(training.weights.parameters(), weights.parameters(), strict=True)
    for found, wanted in pairs:
        assert found.grad is not None
        assert wanted.grad is not None
        assert wanted.grad.abs().max() > 1e-3
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-3)


def test_the_backbone_stays_and_the_loss_falls(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    before = [parameter.clone() for parameter in tiny.decoder.parameters()]
    (document,) = documents(1)
    training = tiny.training(replace(OPTIONS, steps=30, learning_rate=3e-2))
    training.run(iter([document] * 30), tmp_path / "state", lambda step, loss: None)
    assert sum(training.losses[-5:]) < 0.8 * sum(training.losses[:5])
    after = list(tiny.decoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


class StopError(Exception):
    """The run ends here."""


@pytest.mark.parametrize("ages", [False, True], ids=["plain", "ages"])
@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
def test_a_resumed_run_equals_one_that_was_not_stopped(
    scope: IndexScope, ages: bool, tmp_path: Path
) -> None:
    """Bit for bit, from the last saved step; what came after it is done again."""
    tiny, path = Tiny.make(tmp_path, scope, ages=ages), tmp_path / "training.safetensors"
    texts = documents(6)
    whole = tiny.training()
    whole.run(iter(texts), tmp_path / "whole", lambda step, loss: None)

    def stop(step: int, loss: float) -> None:
        if step == 5:  # saved at 4
            raise StopError

    with pytest.raises(StopError):
        tiny.training().run(iter(texts), path, stop)
    resumed = tiny.training()
    assert resumed.load(path)
    assert (resumed.step, resumed.first_document) == (4, 4)
    resumed.run(islice(texts, 4, None), path, lambda step, loss: None)

    assert resumed.losses == whole.losses
    pairs = zip(resumed.weights.parameters(), whole.weights.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    begun = zip(resumed.weights.parameters(), tiny.start.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in begun)


def test_a_state_of_other_heads_is_not_used(tmp_path: Path) -> None:
    tiny, path = Tiny.make(tmp_path), tmp_path / "training.safetensors"
    training = tiny.training()
    assert not training.load(path)
    training.run(iter(documents(6)), path, lambda step, loss: None)
    assert not Tiny.make(tmp_path, "kv_head").training().load(path)
    assert not Tiny.make(tmp_path, ages=True).training().load(path)
    assert not tiny.training(replace(OPTIONS, batch=2)).load(path)
    path.write_bytes(b"half")
    with pytest.raises(ConversionError, match=r"training\.safetensors: not readable"):
        tiny.training().load(path)


def test_biases_learn_at_their_own_rate_and_do_not_decay(tmp_path: Path) -> None:
    """Adam's first step is its rate; ranges that no row reaches stay as they are."""
    tiny = Tiny.make(tmp_path, ages=True)
    training = tiny.training(replace(OPTIONS, warmup_steps=0, age_bias_rate=20.0, weight_decay=0.5))
    training.take([(0, documents(1)[0])])
    moved = torch.cat(training.weights.age_biases()) - torch.cat(tiny.start.age_biases())
    torch.testing.assert_close(moved[:, :4].abs(), torch.full((5, 4), 0.2), rtol=1e-3, atol=0)
    assert not moved[:, 5:].any()


def test_a_batch_is_the_mean_of_its_documents(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    texts = documents(2)
    one, both = tiny.training(), tiny.training(replace(OPTIONS, batch=2))
    losses = [one.add_gradient(text, sample_rows(text, 24, 0)) for text in texts]
    assert losses[0] != losses[1]
    for text in texts:
        both.add_gradient(text, sample_rows(text, 24, 0))
    for single, mean in zip(one.weights.parameters(), both.weights.parameters(), strict=True):
        assert single.grad is not None
        torch.testing.assert_close(mean.grad, single.grad / 2)


def test_processes_must_share_a_step_evenly(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    with pytest.raises(ConversionError, match="fit batch 3 must be a multiple of 2"):
        tiny.training(replace(OPTIONS, batch=3), Ranks(0, 2))
    assert tiny.training(ranks=Ranks(1, 2)).first_document == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("queries", 3),
        ("batch", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("age_bias_rate", 0.0),
        ("clip", -1.0),
        ("weight_decay", -0.1),
        ("block_share", 1.1),
        ("trial_documents", 0),
    ],
    ids=str,
)
def test_impossible_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ConversionError, match=f"fit {name} must be"):
        replace(OPTIONS, **{name: value})  # type: ignore[arg-type]  # one set for all fields
