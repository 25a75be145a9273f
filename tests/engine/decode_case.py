"""Tiny engines whose decode steps run over fixed buffers on the CPU, and what they generate."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loading import load_engine_parts
from engine.messages import Add, Attended, TokenLogprobs
from engine.request import SamplingParams
from engine.step import EngineParts
from tests.engine.fake_channel import FakeChannel
from tests.engine.tiny_checkpoint import CACHE_BYTES, TinyModel

MODEL = TinyModel(head_dim=64, block=16, index_dim=8, top_p=0.4)
POISONED = 59  # token id whose embedding a test makes NaN


def load(folder: Path, **settings: Any) -> EngineParts:
    options = {"max_num_seqs": 5, "max_model_len": 160, "kv_cache_bytes": CACHE_BYTES} | settings
    return load_engine_parts(EngineConfig(model=str(folder), device="cpu", threads=1, **options))


Answer = tuple[list[int], str | None, Attended]


def generate(
    parts: EngineParts,
    requests: list[tuple[list[int], SamplingParams]],
    on_logprobs: Callable[[int, list[TokenLogprobs]], None] = lambda _, __: None,
    *,
    look_ahead: bool | None = None,
) -> list[Answer]:
    """Tokens, finish reason and token budget of each request, all computed together."""
    channel = FakeChannel()
    core = EngineCore(parts.scheduler, parts.runner, channel, look_ahead=look_ahead)
    for request_id, (prompt, params) in enumerate(requests):
        ids = array("i", prompt).tobytes()
        channel.inbox.append(Add(request_id=request_id, params=params, prompt=ids, arrival=0.0))
    answers: dict[int, Answer] = {i: ([], None, Attended()) for i in range(len(requests))}
    while any(reason is None for _, reason, _ in answers.values()):
        core.turn()
        for report in channel.reports:
            for update in report.updates:
                on_logprobs(update.request_id, update.logprobs or [])
                tokens, reason, attended = answers[update.request_id]
                answers[update.request_id] = (
                    tokens + update.tokens,
                    update.finish_reason or reason,
                    update.attended or attended,
                )
        channel.reports.clear()
    core.turn()  # a step may be under way for requests that have ended
    assert parts.scheduler.queues.num_running == 0
    parts.scheduler.check_integrity()
    return [answers[i] for i in range(len(requests))]


def greedy(count: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **params)


PROMPTS = [[7 + i * k % 50 for i in range(n)] for k, n in ((3, 40), (7, 3), (11, 90), (13, 17))]
GREEDY = [(prompt, greedy(10 + 6 * i)) for i, prompt in enumerate(PROMPTS)]
MIXED = [
    (PROMPTS[0], greedy(20)),
    (PROMPTS[1], greedy(16, logit_bias={9: 4.0}, repetition_penalty=1.3, logprobs=3)),
    (
        PROMPTS[2],
        SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=32, ignore_eos=True),
    ),
    (PROMPTS[3], greedy(21, attention_top_p=0.05, presence_penalty=0.5, min_tokens=4)),
]


def same(got: list[Answer], want: list[Answer]) -> None:
    for (tokens, reason, attended), (tokens_2, reason_2, attended_2) in zip(got, want, strict=True):
        assert tokens == tokens_2
        assert reason == reason_2
        assert (attended.pairs, attended.tokens) == (attended_2.pairs, attended_2.tokens)
        assert attended.fraction == pytest.approx(attended_2.fraction)
