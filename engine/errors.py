"""What can go wrong in the engine, as one tree.

EngineError
├── ConfigError          a setting is impossible; the message names the field
├── CheckpointError      a model folder is unusable; the message names the file
├── RequestError         one request is at fault; others go on
│   └── PoisonError      the same request ended the engine before
├── StepMemoryError      there was no memory for a step; it can be tried again in smaller parts
├── QueueFullError       too much work is queued; carries the seconds to wait
└── EngineUnavailableError  the engine is loading, restarting, draining or dead
"""

from __future__ import annotations

from typing import Literal

QueueFullReason = Literal["queue_full", "prefill_backlog"]  # too many requests, or prompt tokens


class EngineError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(EngineError):
    """A setting is impossible. The message names the field and the bound."""


class CheckpointError(EngineError):
    """A model folder is unusable. The message is one line that names the file."""


class RequestError(EngineError):
    """One request cannot be served; it fails alone."""


class PoisonError(RequestError):
    """The same request ended the engine not long ago, and is refused for a while."""


class StepMemoryError(EngineError):
    """There was no memory for a step; it can be tried again in smaller parts."""


class QueueFullError(EngineError):
    """The queue is full. `retry_after` is a whole number of seconds, at least 1."""

    def __init__(
        self, message: str, retry_after: int, reason: QueueFullReason = "queue_full"
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class EngineUnavailableError(EngineError):
    """The engine takes no work now. `retry_after` is a whole number of seconds, at least 1."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after
