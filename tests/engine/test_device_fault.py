"""F06 with a real engine: the step in which the device fails ends the process, and nothing else."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig
from tests.engine.broken_device import generate_through_a_fault
from tests.engine.oracle import Oracle
from tests.engine.process_bench import greedy, run
from tests.engine.tiny_checkpoint import CACHE_BYTES, TinyModel, write_checkpoint


def test_F06_streams_outlast_a_device_that_fails_in_a_step(tmp_path: Path) -> None:
    """The device is the CPU here; tests/gpu/test_faults_cuda.py has a real one."""
    model = TinyModel()
    folder = write_checkpoint(tmp_path / "tiny", model)
    jobs = [([7, 11, 13] * 12, greedy(9, ignore_eos=True)), ([5, 3], greedy(12, ignore_eos=True))]
    oracle = Oracle(folder, model)
    marker = tmp_path / "marker"
    marker.touch()

    async def test() -> None:
        config = EngineConfig(
            model=str(folder), device="cpu", threads=1, kv_cache_bytes=CACHE_BYTES, max_num_seqs=4
        )
        generations, engine = await generate_through_a_fault(config, jobs, marker)
        expected = [oracle.generate(*job).tokens for job in jobs]
        assert [generation.output for generation in generations] == expected
        assert (engine.restarts, engine.recovery.resumed) == (1, 2)

    run(test)
