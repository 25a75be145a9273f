"""Options of a training that takes seconds on a CPU."""

from __future__ import annotations

from typing import Any

from conversion.embedded.options import Phase, PretrainingOptions
from tests.conversion.embedded.little_text import VOCABULARY


def little_options(*phases: Phase, **changes: Any) -> PretrainingOptions:
    """A model of 4 query heads on 2 KV heads, 3 layers unless others are given."""
    little: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "layers": 3,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 48,
        "device": "cpu",
        "compile": False,
        "workers": 0,
    }
    return PretrainingOptions(phases=phases, **(little | changes))
