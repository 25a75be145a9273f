"""How much memory this process has and may still take. Linux; torch-free."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """Memory that this process may still take: the host's, or its cgroup's if that is less."""
    available = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # cgroup v1
    ):
        try:
            maximum, current = (cgroup / limit).read_text().strip(), (cgroup / used).read_text()
        except OSError:
            continue
        if maximum.isdigit():  # v2 says "max" where there is no limit, v1 a number beyond any host
            available = min(available, max(int(maximum) - int(current), 0))
    return available


def resident_bytes() -> int:
    """Physical memory of this process (proc(5), statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
