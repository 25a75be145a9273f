"""The engine answers token for token what slow generation without a cache answers.

The oracle computes the whole sequence again for every token with masks written from the design.
The engine is the real one, scheduler to kernels, in float32 on the CPU; only the wire is missing.
Every test states what it is about (blocks dropped, preemptions, prefix hits) and asserts that it
happened, so that none can pass by never reaching its subject.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.request import SamplingParams
from tests.engine.generate_run import (
    MODELS,
    Request,
    Run,
    expect,
    greedy,
    make_prompts,
    oracle,
)
from tests.engine.oracle import Oracle
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(root / str(i), model)
        for i, (name, model) in enumerate(MODELS.items())
    }


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_the_oracle_for_every_head_map(folders: dict[str, Path], name: str) -> None:
    requests = [(prompt, greedy()) for prompt in make_prompts(3, seed=1, shortest=50)]
    run = Run(folders[name], requests, max_batch_tokens=48, max_num_seqs=4)
    answers = expect(folders[name], name, requests, run)
    assert sum(answer.blocks_dropped for answer in answers) > 20, "the selection must select"
    for request_id, answer in enumerate(answers):
        attended = run.updates[request_id][-1].attended
        assert attended is not None
        assert (attended.pairs, attended.tokens) == (answer.pairs, answer.attended)
        assert attended.fraction == pytest.approx(answer.fraction)


def test_a_bias_by_age_selects_other_blocks(folders: dict[str, Path]) -> None:
    """The same weights, prompts and first tokens: only then are there blocks to select."""
    requests = [(prompt, greedy(2)) for prompt in make_prompts(3, seed=1, shortest=90)]
    plain, biased = (
        Run(folders[name], requests, max_batch_tokens=48, max_num_seqs=4)
        for name in ("per query head", "bias by age")
    )
    for request_id in range(3):
        assert plain.tokens(request_id)[0] == biased.tokens(request_id)[0]
        assert plain.updates[request_id][-1].attended != biased.updates[request_id][-1].attended


@pytest.mark.parametrize("max_batch_tokens", [5, 16, 33, 512])
@pytest.mark.parametrize("max_num_seqs", [1, 5])
def test_chunks_and_batches_do_not_change_tokens(
    folders: dict[str, Path], max_batch_tokens: int, max_num_seqs: int
) -> None:
    name = "per query head"
    requests = [(prompt, greedy(10)) for prompt in make_prompts(5, seed=2)]
    run = Run(
        folders[name],
        requests,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        prefix_caching=False,
        stagger=2,
    )
    expect(folders[name], name, requests, run)


def test_seeded_sampling_equals_the_oracle(folders: dict[str, Path]) -> None:
    name = "per query head"
    options: list[dict[str, Any]] = [
        {},
        {"top_p": 0.8},
        {"top_k": 5, "repetition_penalty": 1.2},
        {"min_p": 0.05},
    ]
    requests: list[Request] = [
        (prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=i, temperature=0.9, **fields))
        for i, (prompt, fields) in enumerate(zip(make_prompts(4, seed=3), options, strict=True))
    ]
    run = Run(folders[name], requests, max_batch_tokens=32, max_num_seqs=4)
    answers = expect(folders[name], name, requests, run)
    greedy_answer = oracle(folders[name], name).generate(requests[0][0], greedy(12))
    assert answers[0].tokens != greedy_answer.tokens, "the draw must matter"


def test_prefix_hits_do_not_change_tokens(folders: dict[str, Path]) -> None:
    name = "per KV head"
    prompts = make_prompts(4, seed=4, shortest=60)
    requests = [(prompt, greedy(8)) for prompt in [*prompts, *prompts]]
    run = Run(folders[name], requests, max_batch_tokens=64, max_num_seqs=1, stagger=3)
    assert run.stats.prefix_hit_tokens > 100
    expect(folders[name], name, requests, run)


@pytest.mark.parametrize("name", ["per query head", "blocks of 16", "groups of one", "bias by age"])
def test_preemption_replays_generated_tokens_under_the_decode_rule(
    folders: dict[str, Path], name: str
) -> None:
    requests = [(prompt, greedy(30)) for prompt in make_prompts(4, seed=5, shortest=24, longest=36)]
    run = Run(
        folders[name],
        requests,
        max_batch_tokens=40,
        max_num_seqs=4,
        max_model_len=72,
        kv_cache_bytes=tight_cache(MODELS[name]),
    )
    assert run.stats.preemptions > 0
    answers = expect(folders[name], name, requests, run)
    assert sum(answer.blocks_dropped for answer in answers) > 20


def test_int8_index_keys_equal_the_oracle(folders: dict[str, Path]) -> None:
    """Keys rounded once, when stored; chunks, prefix hits and preemptions find the same ones."""
    name = "per query head"
    prompts = make_prompts(4, seed=5, shortest=24, longest=36)
    requests = [(prompt, greedy(24)) for prompt in prompts]
    run = Run(
        folders[name],
        requests,
        index_dtype="int8",
        max_batch_tokens=40,
        max_num_seqs=4,
        max_model_len=72,
        kv_cache_bytes=tight_cache(MODELS[name]),
    )
    assert run.stats.preemptions > 0
    assert run.stats.prefix_hit_tokens > 0
    model = MODELS[name]
    assert run.reads.index == sum(map(len, model.retrieval_heads or ())) * (model.index_dim + 2)
    rounded = Oracle(folders[name], model, int8_index=True)
    answers = {i: rounded.generate(*requests[i]) for i in (1, 2)}
    for request_id, answer in answers.items():
        assert run.tokens(request_id) == answer.tokens, f"request {request_id}"
        counts = run.updates[request_id][-1].attended
        assert counts is not None
        assert (counts.pairs, counts.tokens) == (answer.pairs, answer.attended)


def tight_cache(model: TinyModel) -> int:
    """Bytes that four sequences fit into when they start, and no longer when they have grown."""
    per_token = 2 * model.layers * model.num_kv_heads * model.head_dim + 8
    return 4 * 108 * per_token


def test_a_resumed_request_continues_the_interrupted_answer(folders: dict[str, Path]) -> None:
    """F01: after a restart the front end sends prompt and tokens so far."""
    name = "per query head"
    (prompt,) = make_prompts(1, seed=6, shortest=70)
    params = greedy(24)
    whole = oracle(folders[name], name).generate(prompt, params).tokens
    run = Run(folders[name], [(prompt, params)], output=[whole[:11]], max_batch_tokens=32)
    assert run.tokens(0) == whole[11:]


def test_a_request_may_choose_its_own_selection_mass(folders: dict[str, Path]) -> None:
    name = "all retrieval"
    (prompt,) = make_prompts(1, seed=7, shortest=90)
    requests = [(prompt, greedy(attention_top_p=p)) for p in (0.2, 1.0)]
    run = Run(folders[name], requests, max_batch_tokens=64, max_num_seqs=2)
    answers = expect(folders[name], name, requests, run)
    assert answers[0].attended < answers[1].attended
    assert answers[1].blocks_dropped == 0


def test_dense_mode_attends_everything(folders: dict[str, Path]) -> None:
    name = "per query head"
    requests = [(prompt, greedy()) for prompt in make_prompts(3, seed=8, shortest=60)]
    run = Run(folders[name], requests, attention="dense", max_batch_tokens=48, max_num_seqs=3)
    dense = oracle(folders[name], name, dense=True)
    for request_id, (prompt, params) in enumerate(requests):
        assert run.tokens(request_id) == dense.generate(prompt, params).tokens
        assert run.updates[request_id][-1].attended is not None
    sparse = Run(folders[name], requests, max_batch_tokens=48, max_num_seqs=3)
    assert any(run.tokens(i) != sparse.tokens(i) for i in range(3)), "the modes must differ"


def test_prompt_logprobs_equal_the_oracle(folders: dict[str, Path]) -> None:
    name = "per query head"
    (prompt,) = make_prompts(1, seed=9, shortest=60)
    params = greedy(1, prompt_logprobs=2, logprobs=2)
    run = Run(folders[name], [(prompt, params)], max_batch_tokens=17, max_num_seqs=1)
    logprobs = oracle(folders[name], name).generate(prompt, params).logits.log_softmax(dim=-1)
    entries = [entry for update in run.updates[0] for entry in update.prompt_logprobs]
    assert entries[0] is None
    assert len(entries) == len(prompt)
    reported = [*entries[1:], *(e for update in run.updates[0] for e in update.logprobs)]
    for position, entry in enumerate(reported):
        assert entry is not None
        best = logprobs[position].topk(2)
        assert entry.top_ids == best.indices.tolist()
        assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry.logprob == pytest.approx(logprobs[position, entry.token_id].item(), abs=1e-4)
    assert [e.token_id for e in entries[1:] if e is not None] == prompt[1:]
