"""How a command ends when it cannot do what it was asked: one line on stderr, an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(error: object) -> NoReturn:
    """One line for the operator, exit code 1."""
    print(f"rtpurbo: {error}", file=sys.stderr)
    raise SystemExit(1)


def misused(message: str) -> NoReturn:
    """One line for the operator on a flag's value, exit code 2 as for any other misuse."""
    if message:  # none where the help was shown instead
        print(f"rtpurbo: {message}", file=sys.stderr)
    raise SystemExit(2)
