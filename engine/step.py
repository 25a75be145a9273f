"""What one step of the model brings, who brings it, and where it goes. Torch-free, so that tests
can fake it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from engine.batch import Batch
from engine.messages import Attended, EngineInfo, FromEngine, ToEngine, TokenLogprobs
from engine.request import Request
from engine.scheduler import Scheduler


class Sample(NamedTuple):
    """What one row yielded. `token` is None where the row's logits were not finite."""

    token: int | None
    logprobs: TokenLogprobs | None = None


# First prompt position and the entries from there on; the entry of position 0 is None.
PromptLogprobs = tuple[int, list[TokenLogprobs | None]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """By request id; a request is absent where the step had nothing of the kind for it."""

    samples: dict[int, Sample] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)  # values were not finite: KV is not to be used
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    attended: dict[int, Attended] = field(default_factory=dict)
    layer_attended_fraction: dict[int, float] = field(default_factory=dict)  # by layer, this step

    def without(self, request_ids: Collection[int]) -> StepResult:
        """The same but for what some requests got. Means over all requests are left out then."""
        if not request_ids:
            return self
        kept = {
            name: {
                key: value for key, value in getattr(self, name).items() if key not in request_ids
            }
            for name in ("samples", "prompt_logprobs", "attended")
        }
        return StepResult(**kept, failed=self.failed.difference(request_ids))


class PendingStep(Protocol):
    """A step that was started."""

    def finish(self) -> StepResult:
        """Wait for its results; to be called once. Raises as `Runner.start`."""
        ...


class Runner(Protocol):
    """Computes batches in the order in which they are started. One per engine process."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def overlaps(self) -> bool:
        """Whether `start` returns long before a step of decode tokens is computed; such a step may
        come with `NEWEST_TOKEN`."""
        ...

    def start(self, batch: Batch, requests: Mapping[int, Request]) -> PendingStep:
        """Begin to store KV of all spans, and to sample where a span says so.

        At most one step is under way, if this one goes on from its tokens, else none.

        Args:
            requests: by id, those of the batch at least; read before this returns.

        Raises:
            StepMemoryError: nothing of the step counts; any step may follow, parts of it again.
            Exception: any other is fatal.
        """
        ...

    def forget(self, request_id: int) -> None:
        """Drop what is kept for a request that ended; unknown ids are ignored."""
        ...


class Channel(Protocol):
    """Where the engine's loop gets its messages and leaves its own (`engine.ipc.EngineChannel`)."""

    def receive(self, timeout: float) -> list[ToEngine]: ...

    def send(self, message: FromEngine) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What the loop needs beside its channel."""

    scheduler: Scheduler
    runner: Runner
