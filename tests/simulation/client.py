"""Simulated clients: they call, read fast or slowly, leave early, and try again when refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.client import Engine, Generation, Job
from engine.errors import EngineError, EngineUnavailableError, QueueFullError, RequestError
from tests.simulation.history import ChoiceStory, End, History
from tests.simulation.scenario import ClientPlan

PATIENCE = 1000.0  # seconds without news after which a client calls a request lost


class Client:
    """One call, from its arrival to the end of all its choices."""

    def __init__(self, number: int, plan: ClientPlan, engine: Engine, history: History) -> None:
        self._number = number
        self._plan = plan
        self._engine = engine
        self._history = history
        self._loop = asyncio.get_running_loop()
        self._stories = [ChoiceStory(number, index) for index in range(len(plan.choices))]
        history.stories += self._stories

    async def run(self) -> None:
        await asyncio.sleep(self._plan.arrival)
        generations = await self._admitted()
        if generations is None:
            return
        readers = [
            asyncio.ensure_future(self._read(story, generation))
            for story, generation in zip(self._stories, generations, strict=True)
        ]
        await asyncio.wait(readers, timeout=self._plan.leaves_at)
        for story, generation, reader in zip(self._stories, generations, readers, strict=True):
            if not reader.done():  # the client disconnects
                reader.cancel()
                if not story.ends:
                    self._end(story, "left", "")
                    generation.abort()
        for failed in await asyncio.gather(*readers, return_exceptions=True):
            if isinstance(failed, Exception):
                raise failed

    async def _admitted(self) -> Sequence[Generation] | None:
        """All choices, or None when the client has given up."""
        refusal = ""
        for _ in range(self._plan.tries):
            try:
                return self._submit()
            except (QueueFullError, EngineUnavailableError) as error:
                refusal = f"{type(error).__name__}: {error}"
                if error.retry_after < 1:
                    self._history.violation("a refusal without the seconds to wait")
                await asyncio.sleep(error.retry_after)
            except RequestError as error:
                refusal = f"RequestError: {error}"
                break
        for story in self._stories:
            self._end(story, "refused", refusal)
        return None

    def _submit(self) -> list[Generation]:
        """All choices or none, as the server does it."""
        plan = self._plan
        deadline = None if plan.deadline is None else self._loop.time() + plan.deadline
        jobs = [Job(plan.prompt, params, deadline) for params in plan.choices]
        generations = self._engine.submit_all(jobs)
        ids = [generation.request_id for generation in generations]
        self._history.note("client %d: requests %s for %s", self._number, ids, plan)
        for story in self._stories:
            story.began = self._loop.time()
        return generations

    async def _read(self, story: ChoiceStory, generation: Generation) -> None:
        plan = self._plan
        while not story.ends:
            if plan.read_pause:
                await asyncio.sleep(plan.read_pause)
            try:
                update = await generation.next_update(PATIENCE)
            except EngineError as error:
                self._end(story, "failed", f"{type(error).__name__}: {error}")
                return
            if update is None:
                self._history.violation(f"client {story.client}: no news for {PATIENCE:g} s")
                self._end(story, "failed", "lost")
                return
            story.updates.append(update)
            self._history.watch_total(self._engine.stats.generated_tokens)
            if update.finish_reason is not None:
                self._history.note(
                    "client %d.%d: %s", story.client, story.index, update.finish_reason
                )
                self._end(story, _END_OF[update.finish_reason], "")
            elif plan.leaves_after is not None and len(story.tokens) >= plan.leaves_after:
                self._end(story, "left", "")
                generation.abort()
        await self._expect_nothing_more(story, generation)

    async def _expect_nothing_more(self, story: ChoiceStory, generation: Generation) -> None:
        """After its end a request has nothing to say; one that was left may have failed before."""
        try:
            late = await generation.next_update(0.2)
        except EngineError as error:
            if story.ends[0][0] != "left":
                self._history.violation(f"an error after the end: {error}")
        else:
            if late is not None:
                self._history.violation(f"an update after the end: {late}")

    def _end(self, story: ChoiceStory, end: End, message: str) -> None:
        self._history.note("client %d.%d: %s %s", story.client, story.index, end, message)
        story.ends.append((end, message))


_END_OF: dict[str, End] = {
    "stop": "finished",
    "length": "finished",
    "error": "error",
    "deadline": "deadline",
    "abort": "error",
}
