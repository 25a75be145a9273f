"""The sampler against plain formulas, its distribution, and its independence of the batch."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.counter_rng import uniform
from engine.request import SamplingParams
from engine.sampler import Sampler
from engine.step import Sample
from tests.engine.sampler_case import EOS, VOCAB, make_request, random_logits, sample_one

EXTREMES: dict[str, dict[str, Any]] = {
    "coldest": {"temperature": 5e-324},
    "below float32": {"temperature": 1e-50, "top_p": 0.9},
    "cold and restricted": {"temperature": 1e-45, "top_k": 3, "min_p": 1.0},
    "hottest": {"temperature": 1e6},
    "smallest top_p": {"top_p": 5e-324},
    "penalty that divides": {"repetition_penalty": 1e-6},
    "penalty that multiplies": {"repetition_penalty": 1e6},
    "largest bias": {"logit_bias": {3: 1e6, 4: 1e6, 5: -1e6}},
    "all biased away": {"logit_bias": dict.fromkeys(range(37), -1e6)},
    "all masked": {"stop_token_ids": tuple(range(37)), "min_tokens": 9},
    "top_k past the vocabulary": {"top_k": 2**31},
    "negative seed": {"seed": -(2**63)},
}


@pytest.mark.parametrize("scale", [3.0, 1e37], ids=["usual", "huge"])
@pytest.mark.parametrize("name", EXTREMES)
def test_B01_legal_extremes_give_a_token_and_touch_no_neighbour(name: str, scale: float) -> None:
    """A temperature that float32 rounds to 0, or a product past float32, once made ranks of NaN."""
    logits = random_logits(3, scale=scale)
    odd = make_request(1, output=(3, 4), **EXTREMES[name])
    plain = [make_request(2, seed=5), make_request(3, seed=6, top_p=0.8)]
    sampler = Sampler([EOS])
    alone = [
        sampler.sample(logits[[row]].clone(), [r])[0] for row, r in ((0, plain[0]), (2, plain[1]))
    ]
    first, middle, last = sampler.sample(logits.clone(), [plain[0], odd, plain[1]])
    assert middle.token is not None
    assert 0 <= middle.token < VOCAB
    assert [first, last] == alone


def allowed_tokens(logits_V: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Token -> probability by the textbook: temperature, then top-k, top-p, min-p in turn."""
    scaled = [x / params.temperature for x in logits_V.tolist()]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    best = scaled[order[0]]
    weight = {i: math.exp(scaled[i] - best) for i in order}
    kept = order[: params.top_k] if params.top_k else order
    total, mass, nucleus = sum(weight[i] for i in kept), 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weight[token]
        if mass >= params.top_p * total:
            break
    kept = [i for i in nucleus if weight[i] >= params.min_p]
    total = sum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}


def draw_by_formula(probabilities: dict[int, float], draw: float) -> int:
    mass = 0.0
    for token, probability in probabilities.items():
        mass += probability
        if draw < mass:
            return token
    return list(probabilities)[-1]


def test_greedy_is_argmax_and_takes_the_lowest_id_on_ties() -> None:
    logits = random_logits(3)
    logits[1, [4, 9, 30]] = 50.0
    requests = [make_request(i, temperature=0.0) for i in range(3)]
    tokens = [s.token for s in Sampler([EOS]).sample(logits.clone(), requests)]
    assert tokens == [int(logits[0].argmax()), 4, int(logits[2].argmax())]


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    index=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_tokens_follow_the_formula(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, index: int
) -> None:
    request = make_request(
        output=[7] * index,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    logits = random_logits(1, seed=index)[0]
    probabilities = allowed_tokens(logits, request.params)
    if top_k == 0 and top_p == 1.0 and min_p == 0.0:
        probabilities = dict(sorted(probabilities.items()))
    assert sample_one(logits, request).token == draw_by_formula(probabilities, uniform(seed, index))


@pytest.mark.parametrize("limits", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.15}], ids=str)
def test_distribution_over_seeds_is_the_one_asked_for(limits: dict[str, Any]) -> None:
    logits = random_logits(1, seed=5, scale=1.5)[0]
    n = 4000
    requests = [make_request(i, seed=i, temperature=0.8, **limits) for i in range(n)]
    samples = Sampler([EOS]).sample(logits.expand(n, VOCAB).clone(), requests)
    counts = Counter(sample.token for sample in samples)
    expected = allowed_tokens(logits, requests[0].params)
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(n * probability * (1 - probability))
        assert abs(counts[token] - n * probability) <= 4.5 * deviation + 1


def test_ties_at_the_edge_of_top_k_keep_the_lowest_ids() -> None:
    logits = torch.zeros(VOCAB)
    drawn = {sample_one(logits, make_request(seed=s, top_k=3)).token for s in range(60)}
    assert drawn == {0, 1, 2}


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_k": 4, "logprobs": 2},
    {"seed": 3, "top_p": 0.7, "repetition_penalty": 1.5, "output": [3, 4]},
    {"seed": 4, "min_p": 0.05, "frequency_penalty": 1.0, "output": [3, 3]},
    {"temperature": 0.0, "logit_bias": {11: 100.0}, "logprobs": 0},
    {"seed": 5, "presence_penalty": -2.0, "min_tokens": 9, "output": [8]},
]


def test_b31_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(len(MIXED), seed=3)
    requests = [make_request(i, **fields) for i, fields in enumerate(MIXED)]
    together = Sampler([EOS]).sample(logits.clone(), requests)
    alone = [sample_one(logits[i], request) for i, request in enumerate(requests)]
    assert together == alone
    order = [4, 2, 6, 0, 5, 1, 3]
    shuffled = Sampler([EOS]).sample(logits[order].clone(), [requests[i] for i in order])
    assert shuffled == [alone[i] for i in order]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fields", MIXED, ids=lambda fields: "-".join(fields))
def test_f07_a_row_that_is_not_finite_fails_alone(poison: float, fields: dict[str, Any]) -> None:
    logits = random_logits(len(MIXED) + 1, seed=4)
    requests = [make_request(i, **f) for i, f in enumerate([*MIXED, fields])]
    expected = Sampler([EOS]).sample(logits.clone(), requests)
    logits[-1, VOCAB // 2] = poison
    samples = Sampler([EOS]).sample(logits.clone(), requests)
    assert samples[-1] == Sample(None)
    assert samples[:-1] == expected[:-1]


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(1, seed=6)[0]
    request = make_request(temperature=0.0, logit_bias={7: 100.0}, logprobs=5)
    raw = torch.log_softmax(logits, dim=-1)
    reported = sample_one(logits, request).logprobs
    assert reported is not None
    assert reported.token_id == 7
    assert reported.logprob == pytest.approx(raw[7].item())
    assert reported.top_ids == raw.argsort(descending=True)[:5].tolist()
    assert reported.top_logprobs == pytest.approx(raw.sort(descending=True).values[:5].tolist())
    assert all(a >= b for a, b in pairwise(reported.top_logprobs))


def test_logprobs_zero_reports_the_token_only_and_none_reports_nothing() -> None:
    logits = random_logits(1)[0]
    reported = sample_one(logits, make_request(logprobs=0)).logprobs
    assert reported is not None
    assert reported.top_ids == []
    assert sample_one(logits, make_request()).logprobs is None


def test_forget_drops_the_prompt_ids_so_that_a_reused_id_starts_clean() -> None:
    """V34: state that outlives its request would leak into whoever gets its name next."""
    logits = torch.ones(1, VOCAB)
    logits[0, 5] = 1.5
    sampler = Sampler([EOS])
    first = make_request(1, prompt=[5], temperature=0.0, repetition_penalty=2.0)
    assert sampler.sample(logits.clone(), [first])[0].token == 0
    sampler.forget(1)
    second = make_request(1, prompt=[9], temperature=0.0, repetition_penalty=2.0)
    assert sampler.sample(logits.clone(), [second])[0].token == 5
