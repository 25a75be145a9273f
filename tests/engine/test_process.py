"""The life of an engine process: load, serve, drain, stop. Faults are in test_process_faults."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from engine.client import Engine, Job
from engine.config import EngineConfig
from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EngineUnavailableError,
)
from engine.process import EngineProcess
from engine.supervision import SupervisionPolicy
from tests.engine.fake_runner import (
    HANG,
    NOT_FINITE,
    toy_generate,
)
from tests.engine.oracle import Oracle
from tests.engine.process_bench import (
    DEADLINE,
    POLICY,
    channel_folder,
    finish,
    greedy,
    kill,
    make_engine,
    run,
    running,
    submit,
    until,
)
from tests.engine.tiny_checkpoint import CACHE_BYTES, TinyModel, write_checkpoint


def test_generates_for_several_requests_and_stops_without_a_trace() -> None:
    async def test() -> None:
        async with running() as engine:
            border: Engine = engine
            assert border.state == "ready"
            assert border.info.vocab_size == 100
            prompts = [[n, n + 1, 3] for n in range(12)]
            generations = border.submit_all([Job(p, greedy(10)) for p in prompts])
            for prompt, generation in zip(prompts, generations, strict=True):
                last = await finish(generation)
                assert generation.output == toy_generate(prompt, 10)
                assert last.finish_reason == "length"
                assert last.timing is not None
            assert border.stats.generated_tokens == 120
            pid = engine.pid
            assert pid is not None
            folder = channel_folder(engine)
        assert engine.state == "dead"
        assert not psutil.pid_exists(pid)
        folders.append(folder)

    folders: list[str] = []
    run(test)
    assert not Path(folders[0]).exists()


def test_abort_frees_the_engine_and_the_queue() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = submit(engine, [1, 2], greedy(120))
            await generation.next_update()
            generation.abort()
            generation.abort()
            await until(lambda: engine.stats.running == 0 and engine.stats.full_used == 0)
            await finish(submit(engine, [3], greedy(2)))

    run(test)


def test_an_idle_engine_shows_signs_of_life() -> None:
    async def test() -> None:
        async with running() as engine:
            signs: set[float] = set()
            while len(signs) < 3:
                signs.add(engine._last_sign)
                assert engine.restarts == 0
                await asyncio.sleep(0.02)

    run(test)


def test_f07_values_that_are_not_finite_end_only_their_request() -> None:
    async def test() -> None:
        async with running() as engine:
            bad = submit(engine, [5, NOT_FINITE, 6], greedy(5))
            good = submit(engine, [5, 6, 7], greedy(5))
            assert (await finish(bad)).finish_reason == "error"
            await finish(good)
            assert good.output == toy_generate([5, 6, 7], 5)
            assert engine.restarts == 0

    run(test)


def test_the_real_engine_answers_as_the_oracle_and_survives_a_kill(tmp_path: Path) -> None:
    model = TinyModel()
    folder = write_checkpoint(tmp_path / "tiny", model)
    prompt = [7, 11, 13] * 12
    params = greedy(6, ignore_eos=True)
    expected = Oracle(folder, model).generate(prompt, params)
    assert expected.blocks_dropped > 0

    async def test() -> None:
        config = EngineConfig(
            model=str(folder), device="cpu", threads=1, kv_cache_bytes=CACHE_BYTES, max_num_seqs=4
        )
        engine = EngineProcess(config, policy=POLICY)
        await engine.start()
        try:
            assert engine.info.attention == "sparse"
            assert engine.info.vocab_size == model.vocab
            for restarts in (0, 1):
                await until(lambda: engine.state == "ready")
                assert engine.restarts == restarts
                generation = submit(engine, prompt, params)
                await finish(generation)
                assert generation.output == expected.tokens
                if not restarts:
                    kill(engine)
                    await until(lambda: engine.state == "restarting")
        finally:
            await engine.stop()

    run(test)


def test_the_real_engine_names_the_folder_that_is_missing(tmp_path: Path) -> None:
    async def test() -> None:
        engine = EngineProcess(EngineConfig(model=str(tmp_path / "nothing")), policy=POLICY)
        with pytest.raises(CheckpointError, match="nothing: no such folder") as caught:
            await engine.start()
        assert "\n" not in str(caught.value)

    run(test)


LOAD_FAILURES: dict[str, tuple[type[EngineError], str]] = {
    "no-folder": (CheckpointError, "no-folder: there is no config.json"),
    "too-small": (ConfigError, "kv_cache_bytes must be at least 1000, got 1"),
    "crash-at-load": (EngineError, "ended with exit code 7"),
    "bug-at-load": (EngineError, "ZeroDivisionError: nobody expected this"),
    "hang-at-load": (EngineError, "said nothing for 3 s"),
}


@pytest.mark.parametrize("model", LOAD_FAILURES)
def test_an_engine_that_cannot_start_says_why_in_one_line(model: str) -> None:
    kind, message = LOAD_FAILURES[model]

    async def test() -> None:
        load_seconds = 3.0 if model == "hang-at-load" else DEADLINE
        engine = make_engine(model, SupervisionPolicy(load_seconds=load_seconds))
        with pytest.raises(kind, match=message) as caught:
            await engine.start()
        assert "\n" not in str(caught.value)
        assert engine.state == "dead"
        assert engine.pid is None, "nothing is left running"
        await engine.stop()

    run(test)


def test_drain_refuses_new_work_and_lets_live_requests_end() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = submit(engine, [2], greedy(50))
            draining = asyncio.create_task(engine.drain(DEADLINE))
            await until(lambda: engine.state == "draining")
            with pytest.raises(EngineUnavailableError, match="draining"):
                submit(engine, [3], greedy(1))
            await draining
            assert generation.output == toy_generate([2], 50)

    run(test)


def test_stop_fails_what_is_live() -> None:
    async def test() -> None:
        async with running() as engine:
            generation = submit(engine, [HANG], greedy(5))
            engine._policy = SupervisionPolicy(stop_seconds=0.1)
            await engine.stop()
            with pytest.raises(EngineUnavailableError, match="stopped"):
                await finish(generation)

    run(test)


def test_methods_before_start_say_that_the_model_is_loading() -> None:
    async def test() -> None:
        engine = make_engine()
        assert engine.state == "loading"
        with pytest.raises(EngineUnavailableError):
            _ = engine.info
        with pytest.raises(EngineUnavailableError, match="loading"):
            submit(engine, [1], greedy(1))

    run(test)
