"""The engine answers token for token what slow generation without a cache answers.

The oracle computes the whole sequence again for every token with masks written from the design.
The engine is the real one, scheduler to kernels, in float32 on the CPU; only the wire is missing.
Every test states what it is about (blocks dropped, preemptions, prefix hits) and asserts that it
happened, so that none can pass by never reaching its subject.
"""

from __future__ import annotations

import random
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.child_main import build_engine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Add, RequestUpdate, Stats
from engine.request import SamplingParams
from tests.engine.fake_channel import FakeChannel
from tests.engine.oracle import Answer, Oracle
from tests.engine.tiny_checkpoint import CACHE_BYTES, TinyModel, write_checkpoint

MODELS: dict[str, TinyModel] = {
    "per query head": TinyModel(),
    "per KV head": TinyModel(retrieval_heads=((1,), (0, 1, 2), ()), index_scope="kv_head", seed=1),
    "blocks of 16": TinyModel(retrieval_heads=((0,), (2, 3)), block=16, top_p=0.4, seed=2),
    "all retrieval": TinyModel(retrieval_heads=((0, 1, 2, 3), (0, 1, 2, 3)), top_p=0.5, seed=3),
    "groups of one": TinyModel(
        retrieval_heads=((2,), (0, 3), (1,)), num_kv_heads=4, top_p=0.7, seed=4
    ),
    "dense below 80": TinyModel(dense_below=80, seed=5),
    "bias by age": TinyModel(index_age_bias=True),
    "bias per KV head": TinyModel(
        retrieval_heads=((1,), (0, 1, 2), ()), index_scope="kv_head", index_age_bias=True, seed=1
    ),
}
Request = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(root / str(i), model)
        for i, (name, model) in enumerate(MODELS.items())
    }


@cache
def oracle(folder: Path, name: str, dense: bool = False) -> Oracle:
    return Oracle(folder, MODELS[name], dense=dense)


ANSWERS: dict[tuple[str, bytes], Answer] = {}  # several tests ask the same slow question


def answer_of(folder: Path, name: str, prompt: list[int], params: SamplingParams) -> Answer:
    key = (name, msgspec.json.encode([prompt, params]))
    if key not in ANSWERS:
        ANSWERS[key] = oracle(folder, name).generate(prompt, params)
    return ANSWERS[key]


class Run:
    """What an engine said about a list of requests."""

    def __init__(self, folder: Path, requests: list[Request], **settings: Any) -> None:
        stagger = settings.pop("stagger", 0)
        output: list[list[int]] = settings.pop("output", [[]] * len(requests))
        settings.setdefault("kv_cache_bytes", CACHE_BYTES)
        parts = build_engine(
            EngineConfig(model=str(folder), device="cpu", dtype="float32", threads=1, **settings)
        )
        self.reads = parts.runner.info.reads
        channel = FakeChannel()
        core = EngineCore(parts.scheduler, parts.runner, channel)
        for request_id, (prompt, params) in enumerate(requests):
            channel.inbox.append(
                Add(
                    request_id=request_id,
                    params=params,
                    prompt=array("i", prompt).tobytes(),
                    output=array("i", output[request_id]).tobytes(),
                    arrival=0.0,
                )
            )
            for _ in range(stagger):
                core.turn()
        self.updates: dict[int, list[RequestUpdate]] = {i: [] for i in range(len(requests))}
        finished = 0
        while finished < len(requests):
            core.turn()
            for report in channel.reports:
                for update in report.updates:
                    self.updates[update.request_id].append(update)
                    finished += update.finish_reason is not None
            self.stats: Stats = channel.reports[-1].stats
            channel.reports.clear()
        core.turn()
        parts.scheduler.check_integrity()

    def tokens(self, request_id: int) -> list[int]:
        return [token for update in self.updates[request_id] for token in update.tokens]


def greedy(max_tokens: int = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


def make_prompts(
    count: int, seed: int = 0, shortest: int = 20, longest: int = 100
) -> list[list[int]]:
    """Random ids; every second prompt begins like the first one, so that prefixes are shared."""
    source = random.Random(seed)
    prompts: list[list[int]] = []
    for i in range(count):
        prompt = [source.randrange(60) for _ in range(source.randrange(shortest, longest))]
        keep = min(len(prompt), len(prompts[0])) - 5 if i % 2 else 0
        prompts.append(prompts[0][:keep] + prompt[keep:] if keep else prompt)
    return prompts


def expect(folder: Path, name: str, requests: list[Request], run: Run) -> list[Answer]:
    answers = [answer_of(folder, name, prompt, params) for prompt, params in requests]
    for request_id, answer in enumerate(answers):
        assert run.tokens(request_id) == answer.tokens, f"request {request_id}"
    return answers


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
