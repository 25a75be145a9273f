"""What a figure was measured on: every benchmark prints this beside its numbers."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe_hardware() -> dict[str, str | int]:
    """Processor, usable cores, memory and versions of this machine; the GPU if torch sees one."""
    import torch
    import transformers

    facts: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rtpurbo": _own_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda or "unknown"
        facts["cudnn"] = torch.backends.cudnn.version() or "unknown"  # type: ignore[no-untyped-call]
    return facts


def _own_version() -> str:
    try:
        return version("rtpurbo")
    except PackageNotFoundError:  # run from the sources
        return "sources"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
