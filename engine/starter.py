"""Starts engine processes: the first one, and others after it as long as there is hope."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from engine.child_protocol import Child, ChildEndedError, LaunchChild
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.fallback import with_features_off
from engine.messages import EngineInfo
from engine.supervision import RestartBudget, SupervisionPolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadyChild:
    """A child that takes work."""

    child: Child
    info: EngineInfo


class Starter:
    """Launches with patience. Two limits end it: engines lost too often, and starts in vain."""

    def __init__(
        self,
        config: EngineConfig,
        policy: SupervisionPolicy,
        launch: LaunchChild,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.restarts = 0  # processes started again, those included that did not get ready
        self.trouble: str | None = None  # why none got ready lately, for anyone to read
        self.budget = RestartBudget(policy, clock)
        self._config = config
        self._policy = policy
        self._launch_child = launch
        self._clock = clock
        self._sleep = sleep
        self._loading: Child | None = None

    async def launch(self, features_off: int = 0) -> ReadyChild:
        """A child that is ready; it is cleaned up if it does not get that far.

        Args:
            features_off: how much simpler than wanted it is to compute (`engine.fallback`).

        Raises:
            EngineError: one line; CheckpointError or ConfigError where it is one.
        """
        config = with_features_off(self._config, features_off)
        child = self._loading = await self._launch_child(config)
        try:
            info = await child.wait_ready(self._policy.load_seconds)
        except BaseException:
            await self.stop()
            raise
        self._loading, self.trouble = None, None
        logger.info("engine process %d is ready", child.pid)
        return ReadyChild(child, info)

    async def launch_again(self, lost: str, features_off: int = 0) -> ReadyChild:
        """Another child that is ready, after one was lost for the reason given.

        A start that fails spends nothing of the budget: the model folder or the device may come
        back. It is tried again with back-off for some minutes.

        Raises:
            EngineError: too many were lost, or none starts; one line that says which.
        """
        policy = self._policy
        delay = self.budget.spend()
        if delay is None:
            raise EngineError(
                f"it was lost {policy.max_restarts + 1} times within {policy.restart_window:g} s, "
                f"the last time because: {lost}"
            )
        begun = self._clock()
        for failed in itertools.count():
            await self._sleep(max(delay, policy.backoff(failed)))
            self.restarts += 1
            try:
                return await self.launch(features_off)
            except EngineError as error:
                logger.error("engine did not start: %s", error)
                self.trouble = _for_anyone(error)
                if self._clock() - begun >= policy.start_seconds:
                    raise EngineError(f"it does not start again: {error}") from error
        raise AssertionError("the loop has no end")

    async def stop(self) -> None:
        """Leave nothing of a child that is loading."""
        if self._loading is not None:
            await self._loading.close()
            self._loading = None  # not before: whoever is interrupted in `close` is called again


def _for_anyone(error: EngineError) -> str:
    """What may be said where no key is asked for; the log has the rest."""
    if isinstance(error, CheckpointError):
        return "the model folder is not usable"
    if isinstance(error, ConfigError):
        return "the settings do not fit the machine"
    if isinstance(error, ChildEndedError):
        return "the engine ended while it loaded"
    return "the engine does not start"
