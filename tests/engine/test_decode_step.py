"""Steps over fixed buffers give what steps over fresh tensors give; the kernels run on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch, Span
from engine.decode_step import DecodeStep, Eager, Step, padded_sizes
from engine.look_ahead import next_rows
from engine.messages import Attended
from engine.model.decoder import DecoderLayer
from engine.request import SamplingParams
from engine.worker import ModelRunner
from kernels._launch import KernelLibrary
from tests.engine.decode_case import (
    GREEDY,
    MIXED,
    MODEL,
    POISONED,
    PROMPTS,
    generate,
    greedy,
    load,
    same,
)
from tests.engine.launch_count import LaunchCount
from tests.engine.look_ahead_case import compare
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint
from tests.kernels.emulation.library import compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this host")


@pytest.fixture(scope="module")
def library(emulated_kernels: KernelLibrary) -> KernelLibrary:
    return emulated_kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), MODEL)


class CountingBackend(Eager):
    """Counts how often each recording is replayed; index 0 is the largest size."""

    def __init__(self) -> None:
        self.replays: Counter[int] = Counter()

    def capture(self, step: Step) -> Step:
        step()  # as a recording does, which must leave nothing behind
        index = len(self.replays)
        self.replays[index] = 0

        def replay() -> Any:
            self.replays[index] += 1
            return step()

        return replay


@pytest.fixture
def backend(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> CountingBackend:
    """Engines that are loaded now take the emulated kernels and this backend."""
    found = CountingBackend()
    monkeypatch.setattr("engine.loading.choose_kernels", lambda *_: library)
    monkeypatch.setattr("engine.worker.Eager", lambda: found)
    return found


def test_a_request_with_the_id_of_an_ended_one_reads_its_own_pages(folder: Path) -> None:
    """Also without kernels: the block tables are the same."""
    parts = load(folder)
    for request in GREEDY:  # every call numbers its requests from 0
        same(generate(parts, [request]), generate(load(folder), [request]))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Engines start steps before the one before is read, as on a GPU; the sizes of these steps."""
    sizes: list[int] = []

    def follow(*args: Any) -> Batch | None:
        batch = next_rows(*args)
        sizes.extend([] if batch is None else [len(batch.spans)])
        return batch

    monkeypatch.setattr("engine.scheduler.next_rows", follow)
    monkeypatch.setattr(ModelRunner, "overlaps", property(lambda runner: bool(runner._decode)))
    return sizes


@needs_compiler
@pytest.mark.parametrize(("requests", "least"), [(GREEDY, 20), (MIXED, 4)], ids=["greedy", "mixed"])
def test_tokens_and_budget_equal_those_of_the_ops(
    folder: Path,
    backend: CountingBackend,
    ahead: list[int],
    requests: list[tuple[list[int], SamplingParams]],
    least: int,
) -> None:
    got = generate(load(folder), requests)
    assert len(ahead) > least, "steps are started ahead, but where a penalty counts tokens"
    assert sum(backend.replays.values()) > 25, "decode steps took the fixed buffers"
    assert len(+backend.replays) > 2, "of several sizes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loading.choose_kernels", lambda *_: None)
        want = generate(load(folder), requests)
    assert want[0][2].pairs > 0
    same(got, want)


@needs_compiler
def test_int8_index_keys_give_the_tokens_of_the_ops(folder: Path, backend: CountingBackend) -> None:
    requests = [(prompt, greedy(6)) for prompt in PROMPTS[1:3]]
    got = generate(load(folder, index_dtype="int8"), requests)
    assert sum(backend.replays.values()) == 5, "one after the first token, which prefill brings"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loading.choose_kernels", lambda *_: None)
        want = generate(load(folder, index_dtype="int8"), requests)
    same(got, want)


def launches(
    runner: ModelRunner, patch: pytest.MonkeyPatch, method: str
) -> tuple[list[Counter[str]], Counter[str]]:
    """What each layer starts in a step of one row, by name, and what the rest of the step does."""
    found: list[Counter[str]] = []
    inner = getattr(DecoderLayer, method)

    def counted(layer: DecoderLayer, *args: Any) -> Any:
        before = count.names.copy()
        result = inner(layer, *args)
        found.append(count.names - before)
        return result

    assert runner._decode is not None
    with patch.context() as inside, torch.no_grad():
        inside.setattr(DecoderLayer, method, counted)
        with LaunchCount(inside) as count:
            runner._decode._compute(1)
    return found, count.names - sum(found, Counter())


@needs_compiler
@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
def test_launches_of_a_step(
    folder: Path, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch, index_dtype: str
) -> None:
    """Four products, attention, and as few others as there are: shown with pytest -s."""
    runner = load(folder, max_num_seqs=1, index_dtype=index_dtype).runner
    assert isinstance(runner, ModelRunner)
    fused, ends = launches(runner, monkeypatch, "run_fused")
    own = {"qkv_store": 1, "add_norm": 2, "silu_mul": 1, "launch_decode": 1, "mm": 4}
    assert fused == [own | {"index_select": 1}, own, own | {"index_select": 1}]
    turning = {"to": 1, "mul": 1, "cos": 1, "sin": 1}
    given = {"place_rows": 1, "embedding": 1}
    assert ends == turning | given | {"add_norm": 1, "mm": 1, "cat": 1, "pick_tokens": 1}
    runner._decoder.kernels = runner._layers.layer_kernels = None
    assert runner._decode is not None
    buffers = runner._decode._buffers
    buffers._library, buffers._newest_S = None, buffers._newest_S.clone()  # no inference tensor
    plain, plain_ends = launches(runner, monkeypatch, "forward")
    print(f"around the layers: {plain_ends.total()} by PyTorch ops, {ends.total()} fused")
    for before, after in zip(plain, fused, strict=True):
        print(f"launches of a layer: {before.total()} by PyTorch ops, {after.total()} fused")
        assert before.total() > 3 * after.total()


@needs_compiler
def test_steps_ahead_change_no_answer(
    folder: Path, backend: CountingBackend, ahead: list[int]
) -> None:
    prompts = [*PROMPTS, PROMPTS[0][::-1], PROMPTS[2][::2]]
    compare(lambda: load(folder, max_num_seqs=6), prompts, most=18)
    assert len(ahead) > 4


@needs_compiler
def test_preemption_and_taken_over_slots_change_nothing(
    folder: Path, backend: CountingBackend, ahead: list[int]
) -> None:
    """Tables are brought up to date by the device itself, in slots that change their owners."""
    prompts = [PROMPTS[0], PROMPTS[0][::-1], *PROMPTS[:0:-1]]
    requests = [(prompt, greedy(12)) for prompt in prompts]
    roomy = generate(load(folder), requests)
    page = load(folder).runner.info.kv_bytes_per_token * MODEL.block
    tight = load(folder, kv_cache_bytes=20 * page, max_num_seqs=3, max_model_len=112)
    got = generate(tight, requests)
    assert [tokens for tokens, _, _ in got] == [tokens for tokens, _, _ in roomy]
    assert tight.scheduler.queues.preemptions > 0


@needs_compiler
@pytest.mark.parametrize("look_ahead", [False, True], ids=["step by step", "ahead"])
def test_f07_a_row_that_is_not_finite_fails_alone(
    folder: Path, backend: CountingBackend, look_ahead: bool
) -> None:
    """Also where the next step is under way: what it stores for the failed row is wiped, too."""
    requests = [(PROMPTS[0], greedy(12)), (PROMPTS[1], greedy(12)), (PROMPTS[3], greedy(12))]
    expected = generate(load(folder), requests)
    parts = load(folder)
    assert isinstance(parts.runner, ModelRunner)
    with torch.no_grad():
        parts.runner._decoder.embedding.weight[POISONED] = torch.nan
    spoiled = greedy(12, logit_bias={POISONED: 1000.0})  # the next decode step reads the bad row
    beside = [requests[0], (PROMPTS[1], spoiled), requests[2]]
    got = generate(parts, beside, look_ahead=look_ahead)
    assert got[1][:2] == ([POISONED], "error")
    assert [got[0], got[2]] == [expected[0], expected[2]]
    for layer in parts.runner._cache.layers:
        for pool in layer.full_tensors + layer.window_tensors:
            assert pool.isfinite().all(), "pages go back clean"


@needs_compiler
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_models_without_a_selection_have_no_budget(
    tmp_path: Path, backend: CountingBackend, mode: str
) -> None:
    model = TinyModel(head_dim=64, block=16, index_dim=8, retrieval_heads=((), ()))
    folder = write_checkpoint(tmp_path, model)
    tokens, _, attended = generate(load(folder, attention=mode), [(PROMPTS[0], greedy(5))])[0]
    assert len(tokens) == 5
    assert attended == Attended()


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_padded_sizes(most: int, sizes: list[int]) -> None:
    assert padded_sizes(most) == sizes


def test_batches_that_need_more_than_a_token_a_row_are_left_alone() -> None:
    step = object.__new__(DecodeStep)
    step.sizes = [1, 2]
    one = Span(1, 0, 5, [1], "decode", [1], [1], True)
    replay = Span(1, 0, 5, [1, 2], "decode", [1], [1], True)
    prefill = Span(1, 0, 5, [1], "prefill", [1], [1], True)
    assert step.takes(Batch([one, one]))
    for spans in ([], [one, one, one], [replay], [one, prefill]):
        assert not step.takes(Batch(spans))
