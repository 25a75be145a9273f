"""A bench whose steps are started before the one before is read."""

from __future__ import annotations

from collections.abc import Callable

from engine.batch import NEWEST_TOKEN, Batch
from tests.engine.core_bench import Bench
from tests.engine.fake_runner import FakeRunner


class AheadBench(Bench):
    look_ahead = True

    @property
    def ahead(self) -> list[Batch]:
        """The steps that were started before the one before was read."""
        return [s for s in self.runner.steps if all(x.tokens == [NEWEST_TOKEN] for x in s.spans)]

    def run_with(self, runner: FakeRunner) -> None:
        """Go on with another runner."""
        self.runner = runner
        self.core = self.core_of(runner)

    def watch(self, request_id: int, act: Callable[[], None]) -> None:
        """Do something as soon as the end of a request has been told."""
        while not any(u.finish_reason for u in self.updates(request_id)):
            self.turns(1)
        act()
