"""The printed plan against the memory that a process really takes, every page touched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.host_memory import free_host_bytes, resident_bytes

# A process of its own: the peak of this one belongs to other tests.
PROGRAM = """
import json, re
from pathlib import Path
from engine.config import EngineConfig
from engine.embedded import embedded_model_path
from engine.loading import load_engine_parts
from engine.request import Request, SamplingParams

parts = load_engine_parts(EngineConfig(
    model=str(embedded_model_path()), device="cpu", max_model_len=8192, kv_cache_bytes=2**28,
    max_num_seqs=4,
))
for layer in parts.runner._cache.layers:
    for pages in layer.full_tensors + layer.window_tensors:
        pages.zero_()
request = Request(0, [7 + i % 4000 for i in range(8190)], SamplingParams(max_tokens=2))
parts.scheduler.add(request)
while request.total < 8192:
    batch = parts.scheduler.schedule()
    result = parts.runner.start(batch, {0: request}).finish()
    parts.scheduler.update(batch, {i: sample.token for i, sample in result.samples.items()})
# Not ru_maxrss, which begins at the size of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"peak": peak, "plan": parts.runner.info.plan}))
"""


def test_the_plan_is_within_five_percent_of_the_measured_peak() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    printed = re.search(r"total  ([0-9.]+) MiB", figures["plan"])
    assert printed is not None
    assert figures["peak"] == pytest.approx(float(printed[1]) * 2**20, rel=0.05)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    write(tmp_path / "meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    return tmp_path / "meminfo"


def test_free_memory_is_the_hosts_without_a_cgroup(meminfo: Path, tmp_path: Path) -> None:
    assert free_host_bytes(meminfo, tmp_path / "none") == 8000 * 1024


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
    ids=["v2", "v1"],
)
def test_free_memory_respects_the_cgroup(
    limit: str, used: str, meminfo: Path, tmp_path: Path
) -> None:
    write(tmp_path / limit, "5000000\n")
    write(tmp_path / used, "1000000\n")
    assert free_host_bytes(meminfo, tmp_path) == 4_000_000
    write(tmp_path / used, "6000000\n")
    assert free_host_bytes(meminfo, tmp_path) == 0


@pytest.mark.parametrize(
    ("limit", "used", "stat", "field"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
    ids=["v2", "v1"],
)
def test_cached_files_of_the_cgroup_are_free_memory(
    limit: str, used: str, stat: str, field: str, meminfo: Path, tmp_path: Path
) -> None:
    """Reading the weights filled the cache, and a second start found no memory for them."""
    write(tmp_path / limit, "5000000\n")
    write(tmp_path / used, "4500000\n")
    write(tmp_path / stat, f"anon 500000\nactive_file 7\n{field} 4000000\n")
    assert free_host_bytes(meminfo, tmp_path) == 4_500_000


@pytest.mark.parametrize(
    ("limit", "value"),
    [("memory.max", "max"), ("memory/memory.limit_in_bytes", "9223372036854771712")],
)
def test_a_cgroup_without_a_limit_changes_nothing(
    limit: str, value: str, meminfo: Path, tmp_path: Path
) -> None:
    for used in ("memory.current", "memory/memory.usage_in_bytes"):
        write(tmp_path / used, "1000000\n")
    write(tmp_path / limit, value)
    assert free_host_bytes(meminfo, tmp_path) == 8000 * 1024


def test_resident_memory_grows_with_what_is_touched() -> None:
    before = resident_bytes()
    block = bytearray(2**26)
    block[::4096] = b"x" * len(block[::4096])
    assert resident_bytes() - before > 2**25
