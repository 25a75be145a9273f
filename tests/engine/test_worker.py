"""The runner on its own: failures of one row or one step, settings that cannot be."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch
from engine.decode_buffers import DecodeBuffers
from engine.errors import ConfigError
from engine.request import Request
from engine.step import EngineParts
from engine.worker import ModelRunner
from tests.engine.runner_session import Session, load
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint

POISONED = 5  # token id whose embedding the tests make NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), TinyModel())


def poison(parts: EngineParts) -> None:
    assert isinstance(parts.runner, ModelRunner)
    with torch.no_grad():
        parts.runner._decoder.embedding.weight[POISONED] = torch.nan


def test_f07_nan_of_one_request_reaches_neither_its_neighbours_nor_the_next_owner(
    folder: Path,
) -> None:
    good = [[9] * 11, [8, 3] * 15]
    expected = Session(load(folder)).generate(*good)
    # 10 pages of 8: the bad request takes most of the pool, the good ones then get its pages.
    parts = load(folder, kv_cache_bytes=4 * 90 * 104)
    poison(parts)
    session = Session(parts)
    bad = [9] * 20 + [POISONED] + [7] * 30
    assert session.generate(bad) == [([], "error")]
    assert isinstance(parts.runner, ModelRunner)
    for layer in parts.runner._cache.layers:
        for pool in layer.full_tensors + layer.window_tensors:
            assert pool.isfinite().all(), "pages go back clean"
    assert parts.scheduler.pools.full.cached == 0, "nothing of it is shared"
    assert session.generate(good[0], bad, good[1]) == [expected[0], ([], "error"), expected[1]]
    for _ in range(3):
        assert session.generate(*good) == expected


def test_F07_a_prefix_that_a_failed_request_shared_stays_good(folder: Path) -> None:
    """The NaN is in the middle of a later chunk; what was found in the cache, and what earlier
    chunks put there, serves others beside it and afterwards."""
    prefix = [9, 8, 7, 6] * 6
    good = [[*prefix, 4, 4], [*prefix, 3]]
    expected = Session(load(folder, max_batch_tokens=16)).generate(*good)
    parts = load(folder, max_batch_tokens=16)
    poison(parts)
    session = Session(parts)
    bad = [*prefix, 2, 2, 2, 2, 2, 2, 2, 2, 7, POISONED, *[7] * 9]
    assert session.generate(good[0]) == expected[:1]
    hits = parts.scheduler.queues.prefix_hit_tokens
    assert session.generate(good[1], bad, good[0]) == [expected[1], ([], "error"), expected[0]]
    assert parts.scheduler.queues.prefix_hit_tokens == hits + 3 * 24
    hits = parts.scheduler.queues.prefix_hit_tokens
    assert session.generate([*bad[:32], 1], bad)[1] == ([], "error")
    assert parts.scheduler.queues.prefix_hit_tokens >= hits + 2 * 24
    assert session.generate(*good) == expected


def test_a_chunk_that_does_not_sample_is_checked_too(folder: Path) -> None:
    parts = load(folder, max_batch_tokens=16)
    poison(parts)
    session = Session(parts)
    assert session.generate([POISONED] + [7] * 40) == [([], "error")]
    assert parts.scheduler.pools.full.cached == 0
    assert parts.scheduler.pools.window.cached == 0


ODD_VALUES: dict[str, list[Any]] = {
    "temperature": [0.0, 5e-324, 1e-50, 1.0, 1e6, math.nan, -1.0],
    "top_p": [5e-324, 0.5, 1.0, math.nan, 2.0],
    "top_k": [0, 1, 2**40, -3],
    "min_p": [0.0, 1.0, math.inf],
    "presence_penalty": [0.0, 1e6, -math.inf],
    "frequency_penalty": [0.0, -1e6, math.nan],
    "repetition_penalty": [1.0, 1e-6, 1e6, 1e-320],
    "logit_bias": [{}, {3: 1e6}, {3: 1e39}, {-1: 1.0}, dict.fromkeys(range(60), -1e6)],
    "stop_token_ids": [(), (3, 3), (10**6,), tuple(range(60))],
    "min_tokens": [0, 3, 2**40, -1],
    "max_tokens": [5, 1, 0, -1, 2**62],
    "seed": [0, -(2**63), 2**64 + 1],
    "logprobs": [None, 0, 2**30, -1],
    "prompt_logprobs": [None, 0, 70, -1],
    "attention_top_p": [None, 5e-324, 1.0, 0.0, math.nan],
    "ignore_eos": [False, True],
}


@pytest.mark.parametrize("seed", range(3))
def test_V09_no_request_ends_the_loop_or_changes_another(folder: Path, seed: int) -> None:
    """Requests with several values at the edges of what is legal, or past them, all together."""
    plain = [[9] * 11, [8, 3] * 15]
    parts = load(folder, max_num_seqs=8)
    session = Session(parts)
    expected = session.generate(*plain)
    source = random.Random(seed)
    odd = []
    for _ in range(40):
        names = source.sample(sorted(ODD_VALUES), 3)
        odd.append({name: source.choice(ODD_VALUES[name]) for name in names})
    answers = session.generate(*plain, beside=odd)
    assert answers[:2] == expected
    reasons = {reason for _, reason in answers[2:]}
    assert reasons >= {"error", "length"}
    assert reasons <= {"error", "length", "stop"}
    assert parts.scheduler.pools.full.used == parts.scheduler.pools.window.used == 0


@pytest.mark.parametrize(
    ("place", "error"),
    [("layers", torch.OutOfMemoryError), ("logits", MemoryError), ("logits", RuntimeError)],
)
def test_F05_steps_that_are_tried_again_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    """Every third step fails: half-way, with KV of one layer stored, or before the samples."""
    prompts = [[9] * 11, [8, 3] * 15, [5, 6, 7] * 12]
    expected = Session(load(folder, max_batch_tokens=32)).generate(*prompts)
    parts = load(folder, max_batch_tokens=32)
    assert isinstance(parts.runner, ModelRunner)
    decoder, calls = parts.runner._decoder, itertools.count()
    owner = decoder.layers[-1] if place == "layers" else decoder
    name = "forward" if place == "layers" else "logits"
    whole = getattr(owner, name)

    def short_of_memory(*args: object) -> object:
        if next(calls) % 3 == 1:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")
        return whole(*args)

    monkeypatch.setattr(owner, name, short_of_memory)
    session = Session(parts)
    assert session.generate(*prompts) == expected
    assert session.memory_retries >= 3


class ForgetfulDecode:
    """A decode step that fails between filling its buffers and the launch that would have put the
    new pages into the block tables; what it could not do is then left to the other kind of step."""

    is_recorded = False

    def __init__(self, runner: ModelRunner) -> None:
        tensors, info = runner._tensors, runner.info
        self._buffers = DecodeBuffers(
            info.max_num_seqs, tensors.full, tensors.window, info.block_tokens
        )
        self.failures = 0
        self._asked = 0

    def takes(self, batch: Batch) -> bool:
        decodes = all(span.is_row for span in batch.spans)
        self._asked += decodes
        return decodes and self._asked % 2 == 1

    def run(self, batch: Batch, requests: Mapping[int, Request]) -> None:
        self._buffers.fill(batch, requests)
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_F05_a_decode_step_that_fails_leaves_no_wrong_block_tables(folder: Path) -> None:
    """It took the newest page for known, and the next step did not send it."""
    prompts = [[9] * 6, [8, 3] * 4]
    expected = Session(load(folder)).generate(*prompts, max_tokens=20)
    parts = load(folder)
    assert isinstance(parts.runner, ModelRunner)
    decode = ForgetfulDecode(parts.runner)
    parts.runner._decode = decode  # type: ignore[assignment]  # as much of it as is called
    assert Session(parts).generate(*prompts, max_tokens=20) == expected
    assert decode.failures > 10


def test_F05_other_errors_stay_fatal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load(folder)
    assert isinstance(parts.runner, ModelRunner)

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(parts.runner._decoder, "logits", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Session(parts).generate([1, 2])


def test_a_cache_that_holds_no_request_is_refused_with_numbers(folder: Path) -> None:
    with pytest.raises(ConfigError, match="KV cache"):
        load(folder, kv_cache_bytes=1000)


def test_dtype_follows_the_setting(folder: Path) -> None:
    assert load(folder).runner.info.dtype == "float32"
    assert load(folder, dtype="bfloat16").runner.info.dtype == "bfloat16"
