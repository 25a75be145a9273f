"""The engine's loop in process around the toy model, with all else faked but the scheduler."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from engine.core import EngineCore
from engine.messages import Add
from engine.messages import RequestUpdate as Update
from engine.request import SamplingParams
from tests.engine.fake_channel import FakeChannel
from tests.engine.fake_runner import EOS, FakeRunner
from tests.engine.toy_info import toy_info, toy_scheduler


class Bench:
    """An EngineCore with everything around it faked but the scheduler."""

    look_ahead = False

    def __init__(self, *, clock_start: float = 100.0, **options: Any) -> None:
        info_options = {k: options.pop(k) for k in ("full_pages", "window_pages") if k in options}
        self.now = clock_start
        self.info = toy_info(**info_options)
        self.channel = FakeChannel()
        self.runner = FakeRunner(self.info)
        self.scheduler = toy_scheduler(self.info, **options)
        self.core = self.core_of(self.runner)

    def core_of(self, runner: FakeRunner) -> EngineCore:
        channel, ahead = self.channel, self.look_ahead
        return EngineCore(self.scheduler, runner, channel, clock=self.tick, look_ahead=ahead)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def add(
        self,
        request_id: int,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        deadline: float | None = None,
        **params: Any,
    ) -> None:
        self.channel.inbox.append(
            Add(
                request_id=request_id,
                params=SamplingParams(**{"temperature": 0.0, **params}),
                prompt=array("i", prompt).tobytes(),
                output=array("i", output).tobytes(),
                arrival=self.now,
                deadline=deadline,
            )
        )

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.core.turn()

    def until_idle(self, limit: int = 5000) -> None:
        """Turn until the loop waits for messages; then nothing may be left in use."""
        for _ in range(limit):
            self.core.turn()
            if not self.channel.inbox and self.channel.reports[-1].stats.running == 0:
                stats = self.channel.reports[-1].stats
                if stats.waiting == 0:
                    break
        else:
            pytest.fail(f"still busy after {limit} turns")
        self.core.turn()
        assert self.channel.timeouts[-1] > 0, "an idle loop blocks on its socket"
        self.scheduler.check_integrity()

    def updates(self, request_id: int) -> list[Update]:
        return [u for r in self.channel.reports for u in r.updates if u.request_id == request_id]

    def tokens(self, request_id: int) -> list[int]:
        return [token for update in self.updates(request_id) for token in update.tokens]

    def last(self, request_id: int) -> Update:
        """The one update with a finish reason, which must be the last one."""
        updates = self.updates(request_id)
        assert [u.finish_reason is not None for u in updates] == [False] * (len(updates) - 1) + [
            True
        ]
        return updates[-1]


def random_prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    source = random.Random(seed)
    shared = [source.randrange(EOS) for _ in range(longest)]
    prompts = []
    for _ in range(count):
        keep = source.randrange(longest // 2)
        own = [source.randrange(EOS) for _ in range(source.randrange(1, longest // 2))]
        prompts.append(shared[:keep] + own)
    return prompts
