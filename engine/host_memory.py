"""How much memory a process has and this one may still take. Linux; torch-free."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Files of a cgroup: its limit, what it uses, and the field of memory.stat with cached file content.
_V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_V1 = (
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    "total_inactive_file",
)


def free_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """Memory that this process may still take: the host's, or its cgroup's if that is less.

    A cgroup counts file content that the kernel cached, such as weights that were copied or read
    before. It is given back on demand, so it counts as free here, as it does in MemAvailable.
    """
    available = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit, used, stat, cached in (_V2, _V1):
        try:
            maximum, current = (cgroup / limit).read_text().strip(), (cgroup / used).read_text()
        except OSError:
            continue
        if maximum.isdigit():  # v2 says "max" where there is no limit, v1 a number beyond any host
            held = max(int(current) - _field(cgroup / stat, cached), 0)
            available = min(available, max(int(maximum) - held, 0))
    return available


def _field(path: Path, name: str) -> int:
    """A number of a `name value` file, 0 if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def resident_bytes(pid: int | None = None) -> int:
    """Physical memory of a process, by default of this one (proc(5), statm); 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
