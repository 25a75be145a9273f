"""Engines of many head maps, what they say of a list of requests, and what the oracle says."""

from __future__ import annotations

import random
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from engine.child_main import build_engine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Add, RequestUpdate, Stats
from engine.request import SamplingParams
from tests.engine.fake_channel import FakeChannel
from tests.engine.oracle import Answer, Oracle
from tests.engine.tiny_checkpoint import CACHE_BYTES, TinyModel

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
